"""Tags: a key and a value on a model (number 0) or a version, for people and scripts. Nothing decides by them."""

from __future__ import annotations

from sqlalchemy import delete, func, select
from sqlmodel import col

from weighbridge import limits
from weighbridge.registry import catalog, events, versions
from weighbridge.registry.db import Session, insert_into
from weighbridge.registry.errors import Invalid, NotFound
from weighbridge.registry.models import Tag


def set_tag(tx: Session, model: str, number: int, key: str, value: str, *, actor: str) -> None:
    """Write a tag of a version, or of the model with `number` 0. Raises Invalid, NotFound."""
    if not key.strip() or len(key) > limits.TAG_KEY or len(value) > limits.TAG_VALUE:
        rule = f"a key of 1 to {limits.TAG_KEY} and a value of at most {limits.TAG_VALUE} characters"
        raise Invalid(f"tag {limits.quoted(key)}: {rule}")
    model_id = _owner(tx, model, number)
    mine = (col(Tag.model_id) == model_id, col(Tag.number) == number, col(Tag.key) != key)
    if tx.execute(select(func.count()).select_from(Tag).where(*mine)).scalar_one() >= limits.TAGS:
        raise Invalid(f"tag {limits.quoted(key)}: {model} has {limits.TAGS} tags, as many as there may be: delete one")
    insert = insert_into(tx, Tag).values(model_id=model_id, number=number, key=key, value=value)
    identity = [col(Tag.model_id), col(Tag.number), col(Tag.key)]
    tx.execute(insert.on_conflict_do_update(index_elements=identity, set_={"value": value}))
    _tell(tx, "tag.set", model, number, key, {"key": key, "value": value}, actor)


def delete_tag(tx: Session, model: str, number: int, key: str, *, actor: str) -> None:
    """Remove a tag. Raises NotFound."""
    mine = (col(Tag.model_id) == _owner(tx, model, number), col(Tag.number) == number, col(Tag.key) == key)
    if tx.execute(delete(Tag).where(*mine).returning(col(Tag.key))).one_or_none() is None:
        raise NotFound("tag", f"{key} of {model}" + (f"@{number}" if number else ""))
    _tell(tx, "tag.deleted", model, number, key, {"key": key}, actor)


def _owner(tx: Session, model: str, number: int) -> int:
    if number:
        return versions.get(tx, model, number).model_id
    model_id = catalog.get(tx, model).id
    assert model_id is not None
    return model_id


def _tell(tx: Session, kind: str, model: str, number: int, key: str, after: dict[str, str], actor: str) -> None:
    events.record(tx, kind, model=model, version=number or None, subject=f"tag:{key}", after=after, actor=actor)
