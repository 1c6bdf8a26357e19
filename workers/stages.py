"""The real stages: from rows to a task, from its outcome to rows. The stages themselves know neither SQL nor Celery."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sqlalchemy import update
from sqlmodel import col, select

from weighbridge.engines import hardware
from weighbridge.engines.errors import LoadError
from weighbridge.engines.manifest import TensorSpec
from weighbridge.registry import artifacts, champion, identity, jobs, judging, templates, versions
from weighbridge.registry.db import Database, Session
from weighbridge.registry.jobs import Claim
from weighbridge.registry.lifecycle import Stage, Verdict, VersionStatus
from weighbridge.registry.models import CheckpointFile, Metric, Model, Variant, Version
from weighbridge.registry.recipe import ZERO_TAIL, Policy, Recipe, TensorWish, policy_for
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.protocols import Ref, Store
from weighbridge.workers import bindings, judges, programs
from weighbridge.workers.benchmarking.machine import Machine
from weighbridge.workers.cache import WorkerCache
from weighbridge.workers.confined.confine import Confine, Exceeded
from weighbridge.workers.confined.order import Limits
from weighbridge.workers.confined.work import Here, Performer
from weighbridge.workers.datasets import Changed, Datasets
from weighbridge.workers.desk import Desk, OwnDesk
from weighbridge.workers.evaluate import NO_SET, Champion, EvaluateTask
from weighbridge.workers.heartbeat import Heartbeat
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.run import RunSettings
from weighbridge.workers.settings import WorkerSettings
from weighbridge.workers.tasks import Recorder
from weighbridge.workers.validate import Programs, ValidateTask, quarantined
from weighbridge.workers.variant_stages import VariantStages, factories_for
from weighbridge.workers.zero_tails import Before

_MOST_OF_MACHINE = 0.9
"""Of the memory: what is left keeps the kernel from choosing whom to end."""


class TorchStages:
    """Runs every stage but rollout steps on this machine. One job at a time."""

    def __init__(
        self,
        db: Database,
        source: Store,
        blobs: Blobs,
        settings: WorkerSettings,
        policies: tuple[Policy, ...] = (),
        performer: Performer | None = None,
        *,
        apart: bool = False,
    ) -> None:
        """`performer`: where the stages run; None: in this process. `apart`: publishers do not write to `blobs`."""
        self._db, self._source, self._blobs, self._settings = db, source, blobs, settings
        self._policies, self._performer = policies, performer or Here()
        self._cache = WorkerCache(blobs, settings.cache, settings.cache_bytes, apart=apart)
        self._datasets = Datasets(source, blobs, settings.reserve_bytes)
        self._machine = Machine(settings.machine)
        self._variants = VariantStages(
            db, self._desk, self._performer, self._cache, self._datasets, settings, policies, self._machine
        )

    def run(self, claim: Claim, heartbeat: Heartbeat) -> Recorder:
        """Run the claim's stage; return what records its outcome. Raises StorageError for what a retry can cure."""
        if claim.subject_type == "variant":
            return self._variants.run(claim, heartbeat)
        stages: Mapping[Stage, Callable[[int, Heartbeat], Outcome]] = {
            Stage.VALIDATE: self._validate,
            Stage.EVALUATE: self._evaluate,
        }
        with self._machine.working(heartbeat.check):
            outcome = stages[claim.stage](claim.subject_id, heartbeat)
        self._cache.trim()
        heartbeat.check()
        return partial(record, claim=claim, outcome=outcome)

    def _pin(self, version_id: int) -> None:
        """A version that is judged anew is so by what lies there now. Raises judges.Unfit while that is not fit."""
        with self._db.read() as tx:
            version = tx.get_one(Version, version_id)
            model = tx.get_one(Model, version.model_id).name
        if version.recipe_id is None:
            there = judges.beside(self._source, judges.folders_of(version.path, model))
            with self._db.transaction() as tx:
                judging.pin(tx, version_id, version.judgement, there, policy_for(model, self._policies))

    def _validate(self, version_id: int, heartbeat: Heartbeat) -> Outcome:
        self._pin(version_id)
        with self._db.read() as tx:
            version, model, recipe = self._subject(tx, version_id)
            files = tuple(_ref(file) for file in versions.files(tx, version_id))
            known, malformed = bindings.of_rows(templates.every(tx))
            before = _before(tx, version)
        policy = policy_for(model, self._policies)
        if version.size > policy.max_checkpoint_bytes:
            return Outcome.rejected(_too_large(version, policy))
        self._blobs.require_space(version.size, self._settings.reserve_bytes)
        task = ValidateTask(
            model=model,
            version=version.number,
            path=version.path,
            files=files,
            proof=version.proof,
            program=recipe.program,
            inputs=_specs(recipe.inputs),
            outputs=_specs(recipe.outputs),
            programs=Programs(known, policy.programs, malformed),
            device=self._settings.device,
            gates=recipe.gates,
            evaluated=version.eval_pin is not None,
            before=before,
        )
        desk = self._desk(heartbeat.progress, files)
        try:
            outcome = self._performer.perform(task, desk, heartbeat.check, seconds=policy.max_seconds)
        except Exceeded as exceeded:
            outcome = quarantined(task, desk, str(exceeded))
        return replace(outcome, facts={**outcome.facts, **self._datasets.keep(version)})

    def _evaluate(self, version_id: int, heartbeat: Heartbeat) -> Outcome:
        with self._db.read() as tx:
            version, model, recipe = self._subject(tx, version_id)
            artifact = artifacts.find_variant(tx, version_id).artifact_digest
        assert artifact is not None, "evaluation follows a validation that passed"
        dataset, absent = None, NO_SET
        try:
            dataset = self._datasets.evaluation(version)
        except Changed as changed:  # the daemon has it judged again by the set that is there
            absent = str(changed)
        try:
            against = self._champion(version, recipe, dataset)
            programs.prove(self._db, self._cache.path, artifact, *([against.artifact] if against else []))
        except LoadError as wrong:
            return Outcome.rejected(str(wrong))
        task = EvaluateTask(
            artifact=artifact,
            dataset=dataset,
            absent=absent,
            gates=tuple(gate for gate in recipe.gates if gate.metric != ZERO_TAIL),
            champion=against,
            task=recipe.task,
            output=recipe.output,
            threshold=recipe.threshold,
            factories=factories_for(model, self._policies),
            device=self._settings.device,
        )
        seconds = policy_for(model, self._policies).max_seconds
        outcome = self._performer.perform(task, self._desk(heartbeat.progress), heartbeat.check, seconds=seconds)
        doubt = version.facts.get("unfinished")
        if doubt and outcome.verdict is Verdict.NOT_APPLICABLE:
            return Outcome.rejected(f"{doubt} ({outcome.reason})", outcome.facts)
        return outcome

    def _desk(self, progress: Callable[[float], None], files: tuple[Ref, ...] = ()) -> Desk:
        return OwnDesk(self._source, self._blobs, self._cache.path, self._settings.cache, progress, files)

    def _subject(self, tx: Session, version_id: int) -> tuple[Version, str, Recipe]:
        version = tx.get_one(Version, version_id)
        row = versions.judged_by(tx, version)
        recipe = Recipe.model_validate(row.effective) if row is not None else Recipe()
        return version, tx.get_one(Model, version.model_id).name, recipe

    def _champion(self, version: Version, recipe: Recipe, dataset: str | None) -> Champion | None:
        """What `max_drop` compares with: the champion and what is known of it on this evaluation set."""
        if dataset is None or all(gate.max_drop is None for gate in recipe.gates):
            return None
        with self._db.read() as tx:
            number = champion.number(tx, version.model_id)
            slot = champion.slot(tx, version.model_id, number) if number not in (None, version.number) else None
            if number is None or slot is None:
                return None
            known = tx.scalars(
                select(Metric)
                .join(Variant, col(Variant.id) == col(Metric.variant_id))
                .where(col(Variant.artifact_digest) == slot.artifact)
                .where(col(Metric.dataset_digest) == dataset, col(Metric.slice) == "")
            )
            return Champion(number, slot.artifact, {metric.name: metric.value for metric in known})


def open_stages(db: Database, settings: RunSettings, orders: socket.socket) -> TorchStages:
    """Open the stages of a worker process, whose children come from the nursery behind `orders`. Makes no request."""
    import torch

    worker, storage = settings.worker_settings, settings.storage
    torch.set_num_threads(worker.threads)
    blobs = Blobs(storage.open_artifacts(create=True), storage.artifacts_prefix)
    confine = Confine(orders, _limits(worker), worker.threads)
    apart = storage.exposed is None
    return TorchStages(db, storage.open_source(), blobs, worker, settings.policies, confine, apart=apart)


def _limits(worker: WorkerSettings) -> Limits:
    most = worker.memory_bytes or int(_MOST_OF_MACHINE * hardware.describe("cpu").memory_bytes)
    return Limits(worker.parse_seconds, worker.parse_bytes, worker.stage_timeout, most)


def record(tx: Session, *, claim: Claim, outcome: Outcome) -> None:
    """Write what a stage found and finish its job, all or nothing. Raises FencedOut."""
    version = versions.lock(tx, claim.subject_id)
    outcome = _claimed(tx, version, claim, outcome)
    facts = dict(outcome.facts)
    version.evidence = {**version.evidence, **facts.pop("evidence", {})}
    earlier = [] if claim.stage is Stage.VALIDATE else version.facts.get("notes", [])
    notes = list(dict.fromkeys([*earlier, *facts.pop("notes", [])]))
    version.facts = {**version.facts, **facts, "notes": notes}
    if source_digest := facts.get("source_digest"):
        version.source_digest = source_digest
        _record_digests(tx, version, facts.get("files", ()))
    version.revision += 1
    tx.add(version)
    tx.flush()
    if artifact := facts.get("artifact_digest"):
        size = facts["tensors"]["bytes"]
        artifacts.store_artifact(tx, claim.subject_id, artifact_digest=artifact, blobs=facts["blobs"], size=size)
    if claim.stage is Stage.VALIDATE:
        _record_tensor_gates(tx, version, outcome)
    elif outcome.metrics or outcome.gates:
        variant = artifacts.find_variant(tx, claim.subject_id)
        assert variant.id is not None
        artifacts.record_metrics(tx, variant.id, outcome.metrics, judgement=version.judgement)
        artifacts.record_gates(tx, variant.id, outcome.gates, judgement=version.judgement)
    jobs.finish(tx, claim, outcome.verdict, outcome.reason, {"verdict": outcome.verdict, "reason": outcome.reason})


def _claimed(tx: Session, version: Version, claim: Claim, outcome: Outcome) -> Outcome:
    """The outcome, or that another version has these weights: that one was judged, and nothing is kept of this one.

    What is quarantined may be so for what accompanies its weights: it keeps them from nobody.
    """
    weights = outcome.facts.get("weights")
    if claim.stage is not Stage.VALIDATE or weights is None or outcome.verdict is Verdict.QUARANTINED:
        return outcome
    reason = identity.claim(tx, version, weights)
    if reason is None:
        return outcome
    known = {name: outcome.facts[name] for name in ("weights", "source_digest", "files") if name in outcome.facts}
    return Outcome.duplicate(reason, known)


def _record_tensor_gates(tx: Session, version: Version, outcome: Outcome) -> None:
    """Those that validation judges; where there is no artifact there is no variant to write them to: see the reason."""
    if outcome.gates and "artifact_digest" in outcome.facts:
        variant = artifacts.find_variant(tx, version.id or 0)
        assert variant.id is not None
        artifacts.record_gates(tx, variant.id, outcome.gates, judgement=version.judgement, of=artifacts.TENSORS)


def _before(tx: Session, version: Version) -> Before | None:
    """The zeros of the champion before this version, else of the newest ready version before it."""
    ready = select(Version).where(col(Version.model_id) == version.model_id, col(Version.id) != version.id)
    ready = ready.where(col(Version.written_at) <= version.written_at, col(Version.status) == VersionStatus.READY)
    ready = ready.order_by(*identity.newest_first())
    serving = tx.scalars(ready.where(col(Version.number) == champion.number(tx, version.model_id))).first()
    found = serving or tx.scalars(ready).first()
    seen = found.facts.get("tensors", {}).get("zeros") if found is not None else None
    return Before(found.number, seen["tensors"], seen["bytes"]) if found is not None and seen else None


def _record_digests(tx: Session, version: Version, files: Any) -> None:
    """The stage names files relative to the checkpoint; the rows by their whole key."""
    base = version.path if version.path.endswith("/") else version.path.rpartition("/")[0] + "/"
    for file in files:
        key = base.lstrip("/") + file["path"]
        mine = (col(CheckpointFile.version_id) == version.id, col(CheckpointFile.key) == key)
        tx.execute(update(CheckpointFile).where(*mine).values(digest=file["digest"]))


def _too_large(version: Version, policy: Policy) -> str:
    rule = f"the policy for {policy.model} allows {policy.max_checkpoint_bytes:,} (max_checkpoint_bytes)"
    return f"the checkpoint has {version.size:,} bytes, {rule}: nothing of it was read"


def _ref(file: CheckpointFile) -> Ref:
    return Ref(file.key, file.size, file.etag, file.object_version, file.modified)


def _specs(wishes: tuple[TensorWish, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec.model_validate(wish.model_dump()) for wish in wishes)
