"""What lies in the watched bucket, as last seen: what waits, what was refused, what became a version."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import case, func, select, tuple_
from sqlmodel import col

from weighbridge import limits
from weighbridge.registry import events
from weighbridge.registry.db import Session, clock, insert_into, insert_or_skip
from weighbridge.registry.lifecycle import CheckpointState
from weighbridge.registry.models import Checkpoint, Version

_READER = "intake"


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen at a path that is no version (yet). The reason is as it is stored."""

    model: str
    path: str
    state: CheckpointState
    reason: str
    seen: str
    needs_person: bool

    def is_told_by(self, row: Checkpoint) -> bool:
        """Whether the row says the same already."""
        return not row.proof and all(getattr(row, name) == getattr(self, name) for name in _SEEN)


_SEEN = ("state", "reason", "seen", "needs_person")


def first_seen(tx: Session, sights: Sequence[Sight]) -> set[tuple[str, str]]:
    """Write rows of paths that were never seen, with an event each, all at once: there may be a million of them.

    Return the (model, path) of those that somebody else saw first: they are left as they are.
    """
    insert = insert_into(tx, Checkpoint).on_conflict_do_nothing()
    told = insert.returning(col(Checkpoint.id), col(Checkpoint.model), col(Checkpoint.path))
    rows = [Checkpoint(**asdict(one)).model_dump(exclude_none=True) for one in sights]
    ids = {(model, path): id_ for id_, model, path in tx.execute(told, rows)} if rows else {}
    for one in sights:
        if (id_ := ids.get((one.model, one.path))) is not None:
            _tell(tx, f"checkpoint:{id_}", one, before={})
    return {(one.model, one.path) for one in sights} - ids.keys()


def known(tx: Session, places: Collection[tuple[str, str]]) -> dict[tuple[str, str], Checkpoint]:
    """The rows of those of these (model, path) that were seen before."""
    is_one = tuple_(col(Checkpoint.model), col(Checkpoint.path)).in_(places)
    return {(row.model, row.path): row for row in tx.scalars(select(Checkpoint).where(is_one))}


def waiting(
    tx: Session, model: str, path: str, *, reason: str, seen: str, proof: str = "", needs_person: bool = False
) -> Checkpoint:
    """Note that it is not complete yet, or that its recipe is invalid, and what to do about it."""
    return mark(
        tx, model, path, state=CheckpointState.WAITING, reason=reason, seen=seen, proof=proof, needs_person=needs_person
    )


def refused(tx: Session, model: str, path: str, *, reason: str, seen: str, proof: str = "") -> Checkpoint:
    """Note that this content will never become a version."""
    return mark(
        tx, model, path, state=CheckpointState.REFUSED, reason=reason, seen=seen, proof=proof, needs_person=True
    )


def keep(tx: Session, model: str, path: str, *, seen: str) -> Checkpoint:
    """Note that nothing new lies at the path that a version came from, though a part may be gone."""
    row = lookup(tx, model, path, lock=True)
    proof = row.proof if row is not None else ""
    return mark(tx, model, path, state=CheckpointState.COMPLETE, reason="", seen=seen, proof=proof)


def mark(
    tx: Session,
    model: str,
    path: str,
    *,
    state: CheckpointState,
    reason: str,
    seen: str,
    proof: str,
    actor: str = _READER,
    needs_person: bool = False,
) -> Checkpoint:
    """Write what was seen. An event tells a new state or reason; that the same was seen again is none."""
    reason = limits.prose(reason)  # as it is stored: what was cut must not look like news at every look
    fields: dict[str, Any] = {"state": state, "reason": reason, "seen": seen, "proof": proof}
    fields["needs_person"] = needs_person
    row = lookup(tx, model, path, lock=True)
    if row is None:
        row = insert_or_skip(tx, Checkpoint(model=model, path=path, **fields))
        before: dict[str, Any] = {}
        if row is None:  # Somebody else saw it first, just now.
            return mark(
                tx, model, path, state=state, reason=reason, seen=seen, proof=proof, actor=actor,
                needs_person=needs_person,
            )  # fmt: skip
    else:
        before = {"state": row.state, "reason": row.reason}
        if row.needs_person is not needs_person:
            before["needs_person"] = row.needs_person
        if all(getattr(row, name) == value for name, value in fields.items()):
            return row
        for name, value in fields.items():
            setattr(row, name, value)
        row.revision += 1
        row.updated_at = clock(tx)
        tx.flush()
    if before != {"state": state, "reason": reason} and state is not CheckpointState.COMPLETE:
        sight = Sight(model, path, state, reason, seen, needs_person)
        _tell(tx, f"checkpoint:{row.id}", sight, before=before, actor=actor)
    return row


def _tell(tx: Session, subject: str, sight: Sight, *, before: Mapping[str, Any], actor: str = _READER) -> None:
    events.record(
        tx,
        f"checkpoint.{sight.state}",
        model=sight.model,
        subject=subject,
        before=before,
        after={"state": str(sight.state), "reason": sight.reason, "path": sight.path},
        actor=actor,
        reason=sight.reason,
    )


def lookup(tx: Session, model: str, path: str, *, lock: bool = False) -> Checkpoint | None:
    statement = select(Checkpoint).where(col(Checkpoint.model) == model, col(Checkpoint.path) == path)
    if lock:
        statement = statement.with_for_update()
    return tx.scalars(statement, execution_options={"populate_existing": True}).one_or_none()


def seen(
    tx: Session,
    states: Collection[CheckpointState] = tuple(CheckpointState),
    *,
    model: str | None = None,
    below: str = "",
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (model, path, seen, state) of the checkpoints in `states`, unordered, streamed: there may be a million.

    Of all models, or of one (whose rows are found without reading the others'); of paths that begin with `below`.
    """
    columns = (col(Checkpoint.model), col(Checkpoint.path), col(Checkpoint.seen), col(Checkpoint.state))
    statement = select(*columns).where(col(Checkpoint.state).in_(states))
    if model is not None:
        statement = statement.where(col(Checkpoint.model) == model)
    for row in tx.execute(statement, execution_options={"yield_per": 5000}):
        if row[1].startswith(below):
            yield row[0], row[1], row[2], row[3]


def waiting_paths(tx: Session, model: str, most: int) -> list[str]:
    """Return the newest `most` paths of a model that wait, then were refused: what judges them changed, look again."""
    states = (CheckpointState.WAITING, CheckpointState.REFUSED)
    open_ones = (col(Checkpoint.model) == model, col(Checkpoint.state).in_(states))
    first = case((col(Checkpoint.state) == CheckpointState.WAITING, 0), else_=1), col(Checkpoint.id).desc()
    return list(tx.scalars(select(col(Checkpoint.path)).where(*open_ones).order_by(*first).limit(most)))


def waiting_after(tx: Session, last: int, most: int) -> list[tuple[int, str, str]]:
    """Return (id, model, path) of at most `most` checkpoints that wait, the next ones after the id `last`."""
    columns = (col(Checkpoint.id), col(Checkpoint.model), col(Checkpoint.path))
    waits = (col(Checkpoint.state) == CheckpointState.WAITING, col(Checkpoint.id) > last)
    rows = tx.execute(select(*columns).where(*waits).order_by(col(Checkpoint.id)).limit(most))
    return [(id_, model, path) for id_, model, path in rows if id_ is not None]


def count_open(tx: Session) -> int:
    """How many wait or were refused."""
    is_open = col(Checkpoint.state).in_([CheckpointState.WAITING, CheckpointState.REFUSED])
    return tx.execute(select(func.count()).select_from(Checkpoint).where(is_open)).scalar_one()


def removed(tx: Session, model: str, path: str) -> None:
    """The objects are gone: drop what waited for them. A path that versions came from is kept, as complete."""
    row = lookup(tx, model, path, lock=True)
    if row is None or row.state == CheckpointState.COMPLETE:
        return
    subject, before = f"checkpoint:{row.id}", {"state": row.state, "reason": row.reason}
    if tx.scalars(select(col(Version.id)).where(col(Version.checkpoint_id) == row.id).limit(1)).first() is None:
        tx.delete(row)
    else:
        row.state, row.reason, row.seen, row.needs_person = CheckpointState.COMPLETE, "", "", False
        row.revision += 1
    tx.flush()
    events.record(
        tx, "checkpoint.removed", model=model, subject=subject, before=before, after={"path": path}, actor=_READER
    )
