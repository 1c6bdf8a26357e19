"""Models: the rows that versions, recipes and aliases belong to. A model's row is made with its first version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlmodel import col

from weighbridge import limits
from weighbridge.registry import events, identity
from weighbridge.registry.db import Session, insert_or_skip
from weighbridge.registry.errors import Invalid, NotFound
from weighbridge.registry.lifecycle import VersionStatus
from weighbridge.registry.models import Model, Version
from weighbridge.registry.spelling import MOST, nearest
from weighbridge.storage.names import composed


def check_name(name: str) -> None:
    """Raise Invalid unless the name may be a model's: not empty, no `/`, no `:`, no control characters."""
    if not name.strip() or len(name) > limits.MODEL or "/" in name or ":" in name or not name.isprintable():
        rule = f"1 to {limits.MODEL} printable characters without '/' and ':'"
        raise Invalid(f"model name {limits.quoted(name)}: {rule}")


def ensure(tx: Session, name: str, *, actor: str) -> Model:
    """Return the model, made if need be, with its row locked: one transaction at a time adds to a model."""
    name = composed(name)
    locked = select(Model).where(col(Model.name) == name).with_for_update(key_share=True)
    model = tx.scalars(locked, execution_options={"populate_existing": True}).one_or_none()
    if model is None:
        check_name(name)
        model = insert_or_skip(tx, Model(name=name))
        if model is not None:
            events.record(tx, "model.created", model=name, subject=f"model:{model.id}", actor=actor)
        else:  # Somebody else was faster; its transaction has committed.
            model = tx.scalars(locked).one()
    return model


def get(tx: Session, name: str) -> Model:
    """Raises NotFound."""
    model = tx.scalars(select(Model).where(col(Model.name) == composed(name))).one_or_none()
    if model is None:
        raise NotFound("model", name, nearest(name, tx.scalars(select(col(Model.name)).limit(MOST))))
    return model


def page(tx: Session, *, after: str = "", limit: int = 100) -> list[Model]:
    """Return models by name, from behind `after`."""
    return list(tx.scalars(select(Model).where(col(Model.name) > after).order_by(col(Model.name)).limit(limit)))


def latest(tx: Session, model_ids: Sequence[int]) -> Mapping[int, int]:
    """Return the number of the version whose weights were written last, of each of these models that has one."""
    mine = col(Version.model_id).in_(model_ids), col(Version.status) != VersionStatus.DUPLICATE
    found = identity.newest(*mine)
    return {row[0]: row[1] for row in tx.execute(select(found.c.model_id, found.c.number))}
