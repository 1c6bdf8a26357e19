"""The stages of variants: from rows to a task, from its outcome to rows; `workers.stages` does so for versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sqlmodel import col, select

from weighbridge.engines.blobs import read_manifest
from weighbridge.engines.errors import LoadError
from weighbridge.registry import artifacts, benchmarks, jobs, schemas, variants, versions
from weighbridge.registry.db import Database, Session, clock
from weighbridge.registry.jobs import Claim
from weighbridge.registry.lifecycle import Stage
from weighbridge.registry.models import Job, Model, Variant, Version
from weighbridge.registry.recipe import Objective, Policy, Recipe, VariantWish, policy_for
from weighbridge.workers import programs
from weighbridge.workers.benchmark import BenchmarkTask, benchmark
from weighbridge.workers.benchmarking.judgement import WIDE
from weighbridge.workers.benchmarking.machine import Machine
from weighbridge.workers.cache import WorkerCache
from weighbridge.workers.compress import CompressTask
from weighbridge.workers.confined.work import AssembleTask, Performer
from weighbridge.workers.datasets import Changed, Datasets
from weighbridge.workers.desk import Desk
from weighbridge.workers.evaluate import CompareTask
from weighbridge.workers.heartbeat import Heartbeat
from weighbridge.workers.ours import TooLong
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.settings import WorkerSettings

PAUSES = (60.0, 300.0, 1800.0)
"""Seconds until what a busy machine could not show is measured again, by itself: so often, and then when asked to."""
_FACTORY = "factory:"


@dataclass(frozen=True)
class Subject:
    """A variant with everything that its stages are told."""

    variant: Variant
    version: Version
    model: str
    recipe: Recipe
    original: str
    """Digest of the original's artifact."""

    @property
    def wish(self) -> VariantWish:
        return VariantWish.model_validate(self.variant.wish)


class VariantStages:
    """Runs *compress*, *assemble*, *evaluate* and *benchmark* of variants on this machine. One job at a time."""

    def __init__(
        self,
        db: Database,
        desk: Callable[[Callable[[float], None]], Desk],
        performer: Performer,
        cache: WorkerCache,
        datasets: Datasets,
        settings: WorkerSettings,
        policies: tuple[Policy, ...],
        machine: Machine,
    ) -> None:
        self._db, self._desk, self._performer, self._cache, self._datasets = db, desk, performer, cache, datasets
        self._settings, self._policies, self._machine = settings, policies, machine

    def run(self, claim: Claim, heartbeat: Heartbeat) -> Callable[[Session], None]:
        """Run the claim's stage; return what records its outcome. Raises what a retry can cure."""
        with self._db.read() as tx:
            subject = _subject(tx, claim.subject_id)
            parts = _shards(tx, claim) if claim.stage is Stage.ASSEMBLE else []
        stages: Mapping[Stage, Callable[[], Outcome]] = {
            Stage.COMPRESS: lambda: self._compress(subject, claim.part, heartbeat),
            Stage.ASSEMBLE: lambda: self._assemble(subject, parts, heartbeat),
            Stage.EVALUATE: lambda: self._compare(subject, heartbeat),
            Stage.BENCHMARK: lambda: self._benchmark(subject, heartbeat),
        }
        made = [subject.variant.artifact_digest] if claim.stage in (Stage.EVALUATE, Stage.BENCHMARK) else []
        try:
            programs.prove(self._db, self._cache.path, subject.original, *filter(None, made))
            outcome = stages[claim.stage]()
        except (Changed, LoadError) as wrong:
            outcome = Outcome.rejected(str(wrong))
        self._cache.trim()
        heartbeat.check()
        return partial(record, claim=claim, outcome=outcome)

    def _compress(self, subject: Subject, part: str, heartbeat: Heartbeat) -> Outcome:
        return self._perform(replace(self._task(subject), part=part), subject, heartbeat)

    def _assemble(self, subject: Subject, parts: list[Mapping[str, Any]], heartbeat: Heartbeat) -> Outcome:
        return self._perform(AssembleTask(self._task(subject), parts), subject, heartbeat)

    def _perform(self, task: object, subject: Subject, heartbeat: Heartbeat) -> Outcome:
        """At low priority, beside other ordinary jobs of the machine.

        Benchmarks are not run so: at a tenth of a busy processor one took half a minute to start, and hosts do not
        serve at that priority either.
        """
        with self._machine.working(heartbeat.check):
            desk, seconds = self._desk(heartbeat.progress), policy_for(subject.model, self._policies).max_seconds
            try:
                return self._performer.perform(task, desk, heartbeat.check, self._settings.niceness, seconds)
            except TooLong as wrong:  # it was asked for by the recipe, and would take as long again
                return Outcome.rejected(f"{subject.variant.name}: {wrong}")

    def _task(self, subject: Subject) -> CompressTask:
        return CompressTask(
            artifact=subject.original,
            wish=subject.wish,
            task=subject.recipe.task,
            dataset=self._datasets.evaluation(subject.version),
            train=self._datasets.training(subject.version),
            factories=factories_for(subject.model, self._policies),
            device=self._settings.device,
            threads=self._settings.threads,
            shards=variants.shards(subject.version, subject.wish),
            output=subject.recipe.output,
        )

    def _compare(self, subject: Subject, heartbeat: Heartbeat) -> Outcome:
        assert subject.variant.artifact_digest is not None, "a comparison follows a compression that passed"
        task = CompareTask(
            artifact=subject.variant.artifact_digest,
            original=subject.original,
            dataset=self._datasets.evaluation(subject.version),
            task=subject.recipe.task,
            output=subject.recipe.output,
            threshold=subject.recipe.threshold,
            quality=subject.wish.quality or subject.recipe.quality,
            factories=factories_for(subject.model, self._policies),
            device=self._settings.device,
            threads=self._settings.threads,
        )
        return self._perform(task, subject, heartbeat)

    def _benchmark(self, subject: Subject, heartbeat: Heartbeat) -> Outcome:
        assert subject.variant.artifact_digest is not None, "a benchmark follows a verdict of ready"
        for digest in (subject.original, subject.variant.artifact_digest):
            self._fetch(digest)
        task = BenchmarkTask(
            artifact=subject.variant.artifact_digest,
            original=subject.original,
            device=self._settings.device,
            threads=self._settings.threads,
            factories=factories_for(subject.model, self._policies),
            dataset=self._datasets.evaluation(subject.version),
            seconds=self._settings.benchmark_seconds,
            limit=self._settings.benchmark_limit,
        )
        return benchmark(task, cache=self._cache.path, progress=heartbeat.progress, machine=self._machine)

    def _fetch(self, artifact: str) -> None:
        """Bring every blob here before the machine is held: a slow download would hold up everybody."""
        for digest in read_manifest(self._cache.path, artifact).blobs():
            self._cache.path(digest)


def factories_for(model: str, policies: tuple[Policy, ...]) -> tuple[str, ...]:
    """The patterns of factories that the operator allows for a model."""
    programs = policy_for(model, policies).programs
    return tuple(name.removeprefix(_FACTORY) for name in programs if name.startswith(_FACTORY))


def record(tx: Session, *, claim: Claim, outcome: Outcome) -> None:
    """Write what a stage found of a variant and finish its job, all or nothing. Raises FencedOut."""
    version, variant = variants.lock(tx, claim.subject_id)
    facts = dict(outcome.facts)
    if claim.stage is Stage.BENCHMARK and (seen := facts.get("benchmark")):
        measured = schemas.Benchmark.model_validate(seen)
        if not _recorded(tx, claim, version, variant, measured):
            return
    shard = facts.pop("shard", None)
    if shard is None:
        _record_variant(tx, version, variant, facts, outcome)
    said = {"verdict": outcome.verdict, "reason": outcome.reason}
    jobs.finish(tx, claim, outcome.verdict, outcome.reason, said if shard is None else {**said, "shard": shard})


def _recorded(tx: Session, claim: Claim, version: Version, variant: Variant, measured: schemas.Benchmark) -> bool:
    """Keep a measurement; False: the job is queued again, for what the machine was too busy to show."""
    missing = unshown(measured, variants.wishes(tx, version).objective)
    tries = tx.get_one(Job, claim.job_id).max_attempts - claim.attempt
    pause = PAUSES[-min(tries, len(PAUSES))] if missing and tries > 0 else None
    if missing:
        asked = (
            f"weighbridge benchmark retry {tx.get_one(Model, version.model_id).name} {version.number} {variant.name}"
        )
        when = "not tried again by itself" if pause is None else f"next try {_moment(clock(tx) + pause)}"
        measured = measured.model_copy(update={"reason": f"{missing}; {when}, or now: `{asked}`"})
    benchmarks.record(tx, variant, measured, source=claim.owner, actor=f"job:{claim.job_id}")
    if pause is not None:
        jobs.retry(tx, claim, measured.reason, pause)
    return pause is None


def unshown(measured: schemas.Benchmark, objective: Objective) -> str:
    """What of the recipe's wishes this measurement cannot decide, in words; empty where it decides all."""
    if measured.status != "valid":
        return measured.reason
    limits = [name for name in ("max_p99", "min_throughput") if getattr(objective, name) is not None]
    if limits and measured.contended:
        return f"{' and '.join(limits)} cannot be judged beside other work ({measured.contended})"
    ends = {
        "latency": (measured.speedup_low, measured.speedup_high),
        "throughput": (measured.throughput_low, measured.throughput_high),
    }
    low, high = ends.get(objective.best, (None, None))
    if low is not None and high is not None and low <= 1 <= high and high / low > (1 + WIDE) ** 2:
        return f'{low:.2f}–{high:.2f} × the original\'s {objective.best} is too wide to say more than "same"'
    return ""


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S UTC")


_ROWS = ("blobs", "tensors", "artifact_digest", "size", "benchmark", "evidence")
"""Facts that have columns or tables of their own, or belong to the version."""


def _record_variant(tx: Session, version: Version, variant: Variant, facts: dict[str, Any], outcome: Outcome) -> None:
    assert variant.id is not None
    if artifact := facts.get("artifact_digest"):
        stored = {"artifact_digest": artifact, "blobs": facts["blobs"], "size": facts["size"]}
        artifacts.store_artifact(tx, variant.version_id, variant.name, **stored)
    if (rows := facts.get("tensors")) is not None:
        wire = [schemas.VariantTensor.model_validate(row) for row in rows]
        variants.record_tensors(tx, variant.id, wire, judgement=version.judgement)
    notes = [*variant.facts.get("notes", ()), *facts.pop("notes", ())]
    kept = {name: value for name, value in facts.items() if name not in _ROWS}
    variant.facts = {**variant.facts, **kept, "notes": list(dict.fromkeys(notes))}
    tx.add(variant)
    tx.flush()
    if outcome.metrics or outcome.gates:
        artifacts.record_metrics(tx, variant.id, outcome.metrics, judgement=version.judgement)
        artifacts.record_gates(tx, variant.id, outcome.gates, judgement=version.judgement)


def _subject(tx: Session, variant_id: int) -> Subject:
    variant = tx.get_one(Variant, variant_id)
    version = tx.get_one(Version, variant.version_id)
    row = versions.judged_by(tx, version)
    recipe = Recipe.model_validate(row.effective) if row is not None else Recipe()
    original = artifacts.find_variant(tx, variant.version_id).artifact_digest
    assert original is not None, "a version has its original before it has variants"
    return Subject(variant, version, tx.get_one(Model, version.model_id).name, recipe, original)


def _shards(tx: Session, claim: Claim) -> list[Mapping[str, Any]]:
    """What the compress jobs of this judgement left, in the order of the shards."""
    judgement = tx.get_one(Job, claim.job_id).key.rpartition(":")[2]
    mine = select(Job).where(col(Job.subject_type) == "variant", col(Job.subject_id) == claim.subject_id)
    rows = tx.scalars(mine.where(col(Job.stage) == Stage.COMPRESS, col(Job.key).endswith(f":{judgement}")))
    return [row.outcome["shard"] for row in sorted(rows, key=lambda row: int(row.part))]
