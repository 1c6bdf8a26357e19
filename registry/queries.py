"""Listings for people and programs: pages by key, and what belongs to a page fetched for all its rows at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import and_, func, select, tuple_
from sqlmodel import col

from weighbridge.registry.db import Session
from weighbridge.registry.models import Alias, GateResult, Job, Metric, Model, Tag, Variant, Version


@dataclass(frozen=True, slots=True)
class Notes:
    """The aliases and tags of one version."""

    aliases: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """A variant with the metrics and gate results of the version's present judgement."""

    variant: Variant
    metrics: list[Metric]
    gates: list[GateResult]


def versions(
    tx: Session,
    *,
    model: str | None = None,
    statuses: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[tuple[Version, str]]:
    """Return (version, its model's name), the newest recorded first, with ids under `before`."""
    statement = select(Version, col(Model.name)).join(Model, col(Model.id) == col(Version.model_id))
    if model is not None:
        statement = statement.where(col(Model.name) == model)
    if statuses:
        statement = statement.where(col(Version.status).in_(statuses))
    for key, value in (tags or {}).items():
        owner = and_(col(Tag.model_id) == col(Version.model_id), col(Tag.number) == col(Version.number))
        statement = statement.where(select(Tag).where(owner, col(Tag.key) == key, col(Tag.value) == value).exists())
    if before is not None:
        statement = statement.where(col(Version.id) < before)
    rows = tx.execute(statement.order_by(col(Version.id).desc()).limit(limit))
    return [(version, name) for version, name in rows]


def notes(tx: Session, of: Sequence[Version]) -> dict[int, Notes]:
    """Return the aliases and tags of these versions, by version id, in two statements."""
    found: dict[tuple[int, int], Notes] = defaultdict(Notes)
    keys = [(version.model_id, version.number) for version in of]
    if keys:
        aliases = select(Alias).where(tuple_(col(Alias.model_id), col(Alias.number)).in_(keys))
        for alias in tx.scalars(aliases.order_by(col(Alias.name))):
            found[alias.model_id, alias.number].aliases.append(alias.name)
        for tag in tx.scalars(select(Tag).where(tuple_(col(Tag.model_id), col(Tag.number)).in_(keys))):
            found[tag.model_id, tag.number].tags[tag.key] = tag.value
    return {version.id: found[version.model_id, version.number] for version in of if version.id is not None}


def model_notes(tx: Session, model_ids: Sequence[int]) -> tuple[dict[int, dict[str, int]], dict[int, dict[str, str]]]:
    """Return the aliases {model id: {alias: number}} and the models' own tags {model id: {key: value}}."""
    aliases: dict[int, dict[str, int]] = defaultdict(dict)
    tags: dict[int, dict[str, str]] = defaultdict(dict)
    for alias in tx.scalars(select(Alias).where(col(Alias.model_id).in_(model_ids)).order_by(col(Alias.name))):
        aliases[alias.model_id][alias.name] = alias.number
    for tag in tx.scalars(select(Tag).where(col(Tag.model_id).in_(model_ids), col(Tag.number) == 0)):
        tags[tag.model_id][tag.key] = tag.value
    return aliases, tags


def variants(tx: Session, version: Version) -> list[Measured]:
    """Return everything that was measured of a version, in three statements."""
    rows = list(tx.scalars(select(Variant).where(col(Variant.version_id) == version.id).order_by(col(Variant.id))))
    ids = [row.id for row in rows]
    metrics: dict[int, list[Metric]] = defaultdict(list)
    gates: dict[int, list[GateResult]] = defaultdict(list)
    of_metrics = (col(Metric.variant_id).in_(ids), col(Metric.judgement) == version.judgement)
    for metric in tx.scalars(select(Metric).where(*of_metrics).order_by(col(Metric.id))):
        metrics[metric.variant_id].append(metric)
    of_gates = (col(GateResult.variant_id).in_(ids), col(GateResult.judgement) == version.judgement)
    for gate in tx.scalars(select(GateResult).where(*of_gates).order_by(col(GateResult.id))):
        gates[gate.variant_id].append(gate)
    return [Measured(row, metrics[row.id or 0], gates[row.id or 0]) for row in rows]


def jobs(
    tx: Session,
    *,
    states: Sequence[str] = (),
    subject: tuple[str, int] | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[Job]:
    """Return jobs, the newest first, with ids under `before`."""
    statement = select(Job)
    if states:
        statement = statement.where(col(Job.state).in_(states))
    if subject is not None:
        statement = statement.where(col(Job.subject_type) == subject[0], col(Job.subject_id) == subject[1])
    if before is not None:
        statement = statement.where(col(Job.id) < before)
    return list(tx.scalars(statement.order_by(col(Job.id).desc()).limit(limit)))


@dataclass(frozen=True, slots=True)
class Counts:
    """How much there is: models, versions by status, jobs by state."""

    models: int
    versions: dict[str, int]
    jobs: dict[str, int]


def counts(tx: Session) -> Counts:
    models = tx.execute(select(func.count()).select_from(Model)).scalar_one()
    by_status = tx.execute(select(col(Version.status), func.count()).group_by(col(Version.status)))
    by_state = tx.execute(select(col(Job.state), func.count()).group_by(col(Job.state)))
    return Counts(models, {row[0]: row[1] for row in by_status}, {row[0]: row[1] for row in by_state})
