"""Templates: the programs that an operator registered from trusted code. Only the operator's word is kept here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlmodel import col

from weighbridge.registry import events, versions
from weighbridge.registry.db import Session, insert_or_skip
from weighbridge.registry.errors import Conflict, NotFound
from weighbridge.registry.lifecycle import VersionStatus
from weighbridge.registry.models import Model, Template, Version
from weighbridge.registry.spelling import MOST, nearest


def add(
    tx: Session,
    *,
    name: str,
    digest: str,
    fingerprint: str,
    parameters: Mapping[str, Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    actor: str,
) -> Template:
    """Register a template, and judge again what waits for one. Raises Conflict: a name is never given new content.

    The same content may be added again: what is known of it by now (its contract) replaces what was.
    """
    row = insert_or_skip(
        tx,
        Template(
            name=name,
            digest=digest,
            fingerprint=fingerprint,
            parameters=dict(parameters),
            inputs=list(inputs),
            outputs=list(outputs),
        ),
    )
    if row is None:
        there = get(tx, name)
        if there.digest != digest:
            raise Conflict(f"template {name} is there with other content ({there.digest[:12]}): choose another name")
        _learn(tx, there, parameters, inputs, outputs, actor)
        _judge_waiting(tx, name, actor)  # its file may have been damaged, or its row
        return there
    after = {"digest": digest, "fingerprint": fingerprint}
    events.record(tx, "template.added", subject=f"template:{row.id}", after={"name": name, **after}, actor=actor)
    _judge_waiting(tx, name, actor)
    return row


def _learn(
    tx: Session, row: Template, parameters: Mapping[str, Any], inputs: Sequence[Any], outputs: Sequence[Any], actor: str
) -> None:
    known = {"parameters": dict(parameters), "inputs": list(inputs), "outputs": list(outputs)}
    before = {name: getattr(row, name) for name in known}
    if known == before:
        return
    for name, value in known.items():
        setattr(row, name, value)
    tx.add(row)
    contract = {name: known[name] for name in ("inputs", "outputs")}
    was = {name: before[name] for name in contract}
    events.record(tx, "template.learnt", subject=f"template:{row.id}", before=was, after=contract, actor=actor)


def get(tx: Session, name: str) -> Template:
    """Raises NotFound."""
    row = tx.scalars(select(Template).where(col(Template.name) == name)).one_or_none()
    if row is None:
        raise NotFound("template", name, nearest(name, tx.scalars(select(col(Template.name)).limit(MOST))))
    return row


def listing(tx: Session, *, fingerprint: str | None = None, after: str = "", limit: int = 1000) -> list[Template]:
    """Return templates by name, from behind `after`; with `fingerprint` only those that fit it."""
    statement = select(Template).where(col(Template.name) > after)
    if fingerprint is not None:
        statement = statement.where(col(Template.fingerprint) == fingerprint)
    return list(tx.scalars(statement.order_by(col(Template.name)).limit(limit)))


def every(tx: Session) -> list[Template]:
    """Return all templates by name."""
    return list(tx.scalars(select(Template).order_by(col(Template.name))))


def _judge_waiting(tx: Session, name: str, actor: str) -> None:
    """Open again every version that no program was found for: this may be it."""
    waiting = select(Version, col(Model.name)).join(Model, col(Model.id) == col(Version.model_id))
    waiting = waiting.where(col(Version.status) == VersionStatus.NEEDS_BINDING).order_by(col(Version.id))
    locked = waiting.with_for_update(of=Version, key_share=True)
    for version, model in tx.execute(locked, execution_options={"populate_existing": True}).all():
        versions.reopen(tx, version, model, actor=actor, reason=f"template {name} was added")
