"""Rows as wire types. A page of rows costs a fixed number of queries, whatever its length."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import ValidationError
from sqlalchemy import select, tuple_
from sqlmodel import SQLModel, col

from weighbridge import limits
from weighbridge.registry import catalog, lineage, rollouts, schemas, stored, variants, versions
from weighbridge.registry.db import Session, clock
from weighbridge.registry.errors import broken_rules
from weighbridge.registry.hosts import is_silent
from weighbridge.registry.models import (
    Alias,
    Assignment,
    Benchmark,
    GateResult,
    Host,
    Job,
    Metric,
    Model,
    Rollout,
    Tag,
    Template,
    Token,
    Variant,
    Version,
    WorkerNode,
)

logger = logging.getLogger(__name__)

W = TypeVar("W", bound=schemas.Wire)
_STEPS = 500
"""Of a rollout's steps that are shown, the newest."""


def at(seconds: float | None) -> datetime | None:
    """A time of the database's clock as ISO 8601 wants it; one that no calendar has is its first or last day."""
    if seconds is None or math.isnan(seconds):
        return None
    return datetime.fromtimestamp(min(max(seconds, 0.0), limits.LATEST), UTC)


def fields(row: SQLModel) -> dict[str, Any]:
    """A row's columns under their names; its times (`…_at`) as datetimes."""
    return {name: at(value) if name.endswith("_at") else value for name, value in row.model_dump().items()}


def _wire(kind: type[W], found: Mapping[str, Any]) -> W:
    """A row on the wire. What does not parse any more is left out, with the reason, and hides no other row."""
    try:
        return kind.model_validate(found)
    except ValidationError as exc:
        why = f"what is stored of it cannot be read: {broken_rules(exc)}"
        broken = {error["loc"][0] for error in exc.errors() if error["loc"]}
        logger.warning("%s %s: %s", kind.__name__, found.get("id") or found.get("name"), why)
        kept = {name: value for name, value in found.items() if name not in broken}
        blank = {name: _BLANK[name] for name in broken if name in _BLANK}
        reason = {"reason": "; ".join(filter(None, (kept.get("reason"), why)))} if "reason" in kind.model_fields else {}
        return kind.model_validate({**kept, **blank, **reason})


_BLANK: Mapping[Any, Any] = {
    "status": "invalid_noisy",
    "progress": 0.0,
    "parameters": {},
    "inputs": [],
    "outputs": [],
    "slots": [],
}
"""In place of what a wire type demands and a row does not hold."""


def models(tx: Session, rows: Sequence[Model]) -> list[schemas.Model]:
    ids = [row.id for row in rows if row.id is not None]
    latest = catalog.latest(tx, ids)
    aliases: dict[int, dict[str, int]] = defaultdict(dict)
    for alias in tx.scalars(select(Alias).where(col(Alias.model_id).in_(ids)).order_by(col(Alias.name))):
        aliases[alias.model_id][alias.name] = alias.number
    tags = _tags(tx, [(model_id, 0) for model_id in ids])
    return [
        _wire(
            schemas.Model,
            fields(row)
            | {"latest": latest.get(row.id or 0), "aliases": aliases[row.id or 0], "tags": tags[(row.id or 0, 0)]},
        )
        for row in rows
    ]


def version_list(tx: Session, rows: Sequence[Version]) -> list[schemas.Version]:
    return [_wire(schemas.Version, found) for found in _version_fields(tx, rows)]


def version_detail(tx: Session, row: Version) -> schemas.VersionDetail:
    """One version with everything that hangs on it."""
    assert row.id is not None
    recipe = versions.judged_by(tx, row)
    jobs = select(Job).where(col(Job.subject_type) == "version", col(Job.subject_id) == row.id)
    return schemas.VersionDetail(
        **_version_fields(tx, [row])[0],
        recipe=recipe.effective if recipe else None,
        recipe_ignored=recipe.ignored if recipe else [],
        metadata=lineage.of(tx, row.id, lineage.PUBLISHER),
        file_metadata=lineage.of(tx, row.id, lineage.FILES),
        files=[schemas.File(**file.model_dump()) for file in versions.files(tx, row.id)],
        variants=_variants(tx, row),
        variants_settled=variants.settled(tx, row.id),
        jobs=[job_view(job) for job in tx.scalars(jobs.order_by(col(Job.id)))],
    )


def _version_fields(tx: Session, rows: Sequence[Version]) -> list[dict[str, Any]]:
    keys = [(row.model_id, row.number) for row in rows]
    names = _names(tx, {row.model_id for row in rows})
    aliases: dict[tuple[int, int], list[str]] = defaultdict(list)
    named = select(Alias).where(tuple_(col(Alias.model_id), col(Alias.number)).in_(keys)).order_by(col(Alias.name))
    for alias in tx.scalars(named):
        aliases[(alias.model_id, alias.number)].append(alias.name)
    tags = _tags(tx, keys)
    return [
        {**fields(row), "model": names[row.model_id], "aliases": aliases[key], "tags": tags[key]}
        for row, key in zip(rows, keys, strict=True)
    ]


def _names(tx: Session, model_ids: Iterable[int]) -> Mapping[int, str]:
    rows = tx.execute(select(col(Model.id), col(Model.name)).where(col(Model.id).in_(list(model_ids))))
    return {model_id: name for model_id, name in rows if model_id is not None}


def _tags(tx: Session, keys: Sequence[tuple[int, int]]) -> Mapping[tuple[int, int], dict[str, str]]:
    found: dict[tuple[int, int], dict[str, str]] = defaultdict(dict)
    mine = select(Tag).where(tuple_(col(Tag.model_id), col(Tag.number)).in_(keys)).order_by(col(Tag.key))
    for tag in tx.scalars(mine):
        found[(tag.model_id, tag.number)][tag.key] = tag.value
    return found


def _variants(tx: Session, version: Version) -> list[schemas.Variant]:
    """The variants, with what the present judgement found of each."""
    rows = tx.scalars(select(Variant).where(col(Variant.version_id) == version.id).order_by(col(Variant.id))).all()
    if not rows:
        return []
    ids = [row.id for row in rows]
    metrics: dict[int, list[schemas.Metric]] = defaultdict(list)
    measured = select(Metric).where(col(Metric.variant_id).in_(ids), col(Metric.judgement) == version.judgement)
    for metric in tx.scalars(measured.order_by(col(Metric.id))):
        if math.isfinite(metric.value):
            metrics[metric.variant_id].append(schemas.Metric(**metric.model_dump()))
    gates: dict[int, list[schemas.GateResult]] = defaultdict(list)
    judged = select(GateResult).where(
        col(GateResult.variant_id).in_(ids), col(GateResult.judgement) == version.judgement
    )
    for gate in tx.scalars(judged.order_by(col(GateResult.id))):
        gates[gate.variant_id].append(_wire(schemas.GateResult, _numbers(gate)))
    jobs = variants.jobs_of(tx, version.id or 0)
    return [
        _wire(
            schemas.Variant,
            row.model_dump()
            | {
                "metrics": metrics[row.id or 0],
                "gates": gates[row.id or 0],
                "jobs": [job_view(job) for job in jobs.get(row.name, ())],
            },
        )
        for row in rows
    ]


def benchmark_list(rows: Sequence[tuple[str, Benchmark]]) -> list[schemas.VariantBenchmark]:
    """Measurements with the names of their variants."""
    return [_wire(schemas.VariantBenchmark, _numbers(row) | {"variant": name}) for name, row in rows]


def workers(rows: Sequence[WorkerNode]) -> list[schemas.Worker]:
    return [_wire(schemas.Worker, fields(row)) for row in rows]


def tokens(rows: Sequence[Token]) -> list[schemas.Token]:
    return [_wire(schemas.Token, fields(row)) for row in rows]


def templates(rows: Sequence[Template]) -> list[schemas.Template]:
    return [_wire(schemas.Template, fields(row)) for row in rows]


def job_view(row: Job) -> schemas.Job:
    return _wire(schemas.Job, _numbers(row))


def hosts(tx: Session, rows: Sequence[Host], silent_seconds: float) -> list[schemas.Host]:
    now = clock(tx)
    held: dict[str, list[schemas.AssignmentView]] = defaultdict(list)
    mine = (
        select(Assignment, col(Model.name))
        .join(Model, col(Model.id) == col(Assignment.model_id))
        .where(col(Assignment.host_id).in_([row.id for row in rows]))
        .order_by(col(Model.name))
    )
    for assignment, model in tx.execute(mine):
        held[assignment.host_id].append(_assignment(assignment, model))
    return [
        _wire(
            schemas.Host,
            fields(row)
            | {
                "silent_seconds": _silent_for(row, now),
                "silent": row.state == "enrolled" and is_silent(row, now, silent_seconds),
                "assignments": held[row.id],
            },
        )
        for row in rows
    ]


def silent_hosts(tx: Session, silent_seconds: float) -> list[schemas.SilentHost]:
    """The enrolled hosts that say nothing, by name."""
    now = clock(tx)
    rows = tx.scalars(select(Host).where(col(Host.state) == "enrolled").order_by(col(Host.name), col(Host.id)))
    silent = [row for row in rows if is_silent(row, now, silent_seconds)]
    return [schemas.SilentHost(id=row.id, name=row.name, seconds=_silent_for(row, now)) for row in silent]


def _silent_for(row: Host, now: float) -> float | None:
    return None if row.seen_at is None else max(now - row.seen_at, 0.0)


def _assignment(row: Assignment, model: str) -> schemas.AssignmentView:
    found = fields(row) | {"model": model, "observed": row.observed or None}
    return _wire(schemas.AssignmentView, found)


def rollout_list(tx: Session, rows: Sequence[Rollout]) -> list[schemas.Rollout]:
    names = _names(tx, {row.model_id for row in rows})
    return [_rollout(row, names[row.model_id]) for row in rows]


def rollout_detail(tx: Session, row: Rollout) -> schemas.Rollout:
    """One rollout with its steps."""
    assert row.id is not None
    steps = [_wire(schemas.RolloutStep, fields(step)) for step in rollouts.steps(tx, row.id, newest=_STEPS)]
    return rollout_list(tx, [row])[0].model_copy(update={"steps": steps})


def _rollout(row: Rollout, model: str) -> schemas.Rollout:
    found = fields(row) | {"model": model, "fleet": _labels(row.fleet), "waves": row.settings.get("waves") or []}
    for given in ("variants", "from_variants"):
        found[given] = {kind: entry.get("variant", "") for kind, entry in found[given].items()}
    return _wire(schemas.Rollout, found)


def _labels(text: str) -> dict[str, str]:
    try:
        return stored.labels(text)
    except stored.Unreadable:
        return {"": text}


def _numbers(row: SQLModel) -> dict[str, Any]:
    """`fields`, without the infinities that a column of floats may hold."""
    found = fields(row)
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in found.items()
    }
