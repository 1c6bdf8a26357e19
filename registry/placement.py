"""Which variant of a version each kind of host gets: the rows that `choice` decides from, and its answer as a row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlmodel import col

from weighbridge.registry import benchmarks, choice, variants, workers_seen
from weighbridge.registry.choice import ORIGINAL, Candidate
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Conflict
from weighbridge.registry.lifecycle import VariantStatus
from weighbridge.registry.models import Benchmark, Metric, Variant, Version
from weighbridge.registry.recipe import Recipe, Task
from weighbridge.registry.schemas import Choice

KEPT = "kept"
"""The metric, and the fact, that says which share of the original a variant kept."""
_METRIC: Mapping[Task, str] = {
    "classification": "accuracy",
    "regression": "mse",
    "language": "perplexity",
    "embedding": "cosine",
}


def choices(tx: Session, version: Version, kinds: Collection[str]) -> dict[str, Choice]:
    """Choose a variant for each kind of host, and for every other one (the key "", which gets the original).

    Only ready variants that were validly measured on that very kind are chosen from. Raises Conflict where the original
    is not ready.
    """
    assert version.id is not None
    ready = {row.name: row for row in variants.listing(tx, version.id) if row.status == VariantStatus.READY}
    original = ready.get(ORIGINAL)
    if original is None or original.artifact_digest is None:
        raise Conflict(f"version {version.number} has no original that is ready: nothing of it can be served")
    recipe, kept = variants.wishes(tx, version), _kept(tx, version, list(ready.values()))
    facts = benchmarks.facts(tx, version.id)
    workers = workers_seen.kinds(tx)
    found = {"": _original(original, "", "", "a kind of host that nobody measured gets the original")}
    for kind in sorted(set(kinds) - {""}):
        measured = {name: row for name, row in facts.get(kind, {}).items() if name in ready}
        label = _label(measured.values(), workers.get(kind, {}))
        if ORIGINAL in measured:
            found[kind] = _chosen(kind, label, recipe, ready, measured, kept)
        else:
            found[kind] = _original(original, kind, label, _unmeasured(measured, live=kind in workers))
    return found


def _chosen(
    kind: str,
    label: str,
    recipe: Recipe,
    ready: Mapping[str, Variant],
    measured: Mapping[str, Benchmark],
    kept: Mapping[str, float | None],
) -> Choice:
    candidates = [_candidate(ready[name], row, kept[name]) for name, row in measured.items()]
    metric = recipe.quality.metric or _METRIC[recipe.task]
    answer = choice.choose(candidates, recipe.objective, metric)
    artifact = ready[answer.variant].artifact_digest
    assert artifact is not None, "it was measured by its artifact"
    return Choice(
        kind=kind,
        label=label,
        variant=answer.variant,
        artifact=artifact,
        reason=answer.reason,
        front=list(answer.front),
        measured=True,
    )


def _candidate(variant: Variant, row: Benchmark, kept: float | None) -> Candidate:
    assert row.p99 is not None
    assert row.throughput is not None
    assert row.memory is not None
    return Candidate(
        variant=variant.name,
        artifact=row.artifact_digest,
        quality=kept,
        p99=row.p99,
        throughput=row.throughput,
        memory=row.memory,
        size=variant.size,
        spread=row.spread or 0.0,
        finding=row.finding,
        speedup=row.speedup,
        throughput_ratio=row.throughput_ratio,
        speedup_interval=_interval(row.speedup_low, row.speedup_high),
        throughput_interval=_interval(row.throughput_low, row.throughput_high),
        contended=row.contended,
    )


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _kept(tx: Session, version: Version, rows: Sequence[Variant]) -> dict[str, float | None]:
    """Which share of the original each variant kept, by this judgement; None: its drift alone was judged."""
    statement = (
        select(col(Metric.variant_id), col(Metric.value))
        .where(col(Metric.variant_id).in_([row.id for row in rows]), col(Metric.name) == KEPT, col(Metric.slice) == "")
        .where(col(Metric.judgement) == version.judgement)
        .order_by(col(Metric.id))
    )
    measured = {row.variant_id: row.value for row in tx.execute(statement)}
    shares = {row.name: measured.get(row.id, _number(row.facts.get(KEPT))) for row in rows}
    return {**shares, ORIGINAL: 1.0}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _original(original: Variant, kind: str, label: str, reason: str) -> Choice:
    assert original.artifact_digest is not None
    return Choice(kind=kind, label=label, variant=ORIGINAL, artifact=original.artifact_digest, reason=reason)


def _unmeasured(measured: Mapping[str, Benchmark], *, live: bool) -> str:
    if measured:
        return "the original was not measured on this kind yet, so that nothing can be compared with it"
    waits = "a worker of this kind measures it" if live else "no worker of this kind is there to measure it"
    return f"not measured on this kind yet ({waits})"


def _label(measured: Collection[Benchmark], worker: Mapping[str, Any]) -> str:
    """The hardware in words, as whoever measured it or works on it said."""
    said = [row.hardware.get("label") for row in measured] + [worker.get("label")]
    return str(next((label for label in said if label), ""))
