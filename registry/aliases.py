"""Aliases: movable names of versions. `champion` and `previous` belong to the rollouts (registry.champion)."""

from __future__ import annotations

import re

from sqlalchemy import func, select
from sqlmodel import col

from weighbridge import limits
from weighbridge.registry import catalog, events, versions
from weighbridge.registry.db import Session, clock, insert_or_skip
from weighbridge.registry.errors import Conflict, Invalid, NotFound, RevisionMismatch
from weighbridge.registry.models import Alias
from weighbridge.registry.spelling import nearest

_ROLLOUTS = frozenset({"champion", "previous"})
_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{limits.ALIAS}}}")
_NUMBER = re.compile(r"v?\d+", re.IGNORECASE)


def set_alias(
    tx: Session,
    model: str,
    name: str,
    number: int,
    *,
    actor: str,
    reason: str = "",
    expected_revision: int | None = None,
) -> Alias:
    """Point an alias at a version. Raises Invalid, NotFound, Conflict, RevisionMismatch (0: it must be new)."""
    _check_name(name)
    version = versions.get(tx, model, number)
    row = _locked(tx, version.model_id, name)
    found = row.revision if row else 0
    if expected_revision is not None and expected_revision != found:
        raise RevisionMismatch(f"alias {name} of model {model}", expected_revision, found)
    before = row.number if row else None
    if row is None:
        _check_room(tx, version.model_id, model)
        row = insert_or_skip(
            tx, Alias(model_id=version.model_id, name=name, number=version.number, updated_at=clock(tx))
        )
        if row is None:
            raise Conflict(f"alias {name} of model {model} was set by somebody else just now: read it again")
    elif row.number == version.number:
        return row
    else:
        row.number, row.revision, row.updated_at = version.number, row.revision + 1, clock(tx)
        tx.flush()
    events.record(
        tx,
        "alias.moved",
        model=model,
        version=version.number,
        subject=f"alias:{name}",
        before={"number": before},
        after={"alias": name, "number": version.number},
        actor=actor,
        reason=reason,
    )
    return row


def delete_alias(
    tx: Session, model: str, name: str, *, actor: str, reason: str = "", expected_revision: int | None = None
) -> None:
    """Remove an alias. Raises Conflict, NotFound, RevisionMismatch."""
    _check_name(name)
    line = catalog.get(tx, model)
    assert line.id is not None
    row = _locked(tx, line.id, name)
    if row is None:
        known = tx.scalars(select(col(Alias.name)).where(col(Alias.model_id) == line.id))
        raise NotFound("alias", f"{name} of model {model}", nearest(name, known))
    if expected_revision is not None and expected_revision != row.revision:
        raise RevisionMismatch(f"alias {name} of model {model}", expected_revision, row.revision)
    before = {"alias": name, "number": row.number}
    tx.delete(row)
    tx.flush()
    events.record(tx, "alias.deleted", model=model, subject=f"alias:{name}", before=before, actor=actor, reason=reason)


def _check_name(name: str) -> None:
    if name in _ROLLOUTS:
        raise Conflict(f"alias {name} is moved by rollouts: start one of the version that you want there")
    if not _NAME.fullmatch(name) or name.lower() == "latest" or _NUMBER.fullmatch(name):
        rule = f"up to {limits.ALIAS} letters, digits, '_' and '-'; not 'latest' and not a version number"
        raise Invalid(f"alias {limits.quoted(name)}: {rule}")


def _check_room(tx: Session, model_id: int, model: str) -> None:
    count = select(func.count()).select_from(Alias).where(col(Alias.model_id) == model_id)
    if tx.execute(count).scalar_one() >= limits.ALIASES:
        raise Invalid(f"{model} has {limits.ALIASES} aliases, as many as there may be: delete one")


def _locked(tx: Session, model_id: int, name: str) -> Alias | None:
    mine = select(Alias).where(col(Alias.model_id) == model_id, col(Alias.name) == name).with_for_update()
    return tx.scalars(mine, execution_options={"populate_existing": True}).one_or_none()
