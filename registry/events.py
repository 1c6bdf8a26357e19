"""What changed: written with the change, numbered after commit, read as a feed without gaps.

Transactions commit in another order than they insert, so a reader by id misses rows. One sequencer at a time gives the
committed events their `seq`, in one transaction; whoever reads up to `seq` n has seen everything up to n.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import func, select, update
from sqlmodel import col

from weighbridge import limits
from weighbridge.registry import leases
from weighbridge.registry.db import Database, Session
from weighbridge.registry.models import Event

_LEASE_SECONDS = 3.0
_BATCH = 5000


def record(
    tx: Session,
    kind: str,
    *,
    model: str | None = None,
    version: int | None = None,
    subject: str = "",
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    actor: str,
    reason: str = "",
) -> None:
    """Write an event in the transaction of the change that it tells. A long subject or actor is cut."""
    tx.add(
        Event(
            kind=kind,
            model=model,
            version=version,
            subject=limits.cut(subject, limits.SUBJECT),
            before=dict(before or {}),
            after=dict(after or {}),
            actor=limits.cut(actor, limits.ACTOR),
            reason=reason,
        )
    )


def sequence(db: Database, owner: str) -> int:
    """Number the committed events that have no number yet; return how many. 0 also while another owner sequences.

    Taking the lease locks its row until commit: of two sequencers the second sees all that the first numbered.
    """
    waiting = select(col(Event.id)).where(col(Event.seq).is_(None))
    with db.read() as tx:
        if tx.execute(waiting.limit(1)).first() is None:
            return 0
    with db.transaction() as tx:
        if leases.acquire(tx, "sequencer", owner, _LEASE_SECONDS) is None:
            return 0
        last = select(func.coalesce(func.max(Event.seq), 0)).scalar_subquery()
        numbered = (
            select(col(Event.id), (func.row_number().over(order_by=col(Event.id)) + last).label("seq"))
            .where(col(Event.seq).is_(None))
            .order_by(col(Event.id))
            .limit(_BATCH)
            .subquery()
        )
        statement = update(Event).where(col(Event.id) == numbered.c.id).values(seq=numbered.c.seq)
        return tx.execute(statement, execution_options={"synchronize_session": False}).rowcount  # type: ignore[attr-defined, no-any-return]


def read(
    tx: Session, after: int, limit: int, model: str | None = None, kinds: Collection[str] | None = None
) -> list[Event]:
    """Return the numbered events behind `after`, in order."""
    statement = select(Event).where(col(Event.seq) > after).order_by(col(Event.seq)).limit(limit)
    if model is not None:
        statement = statement.where(col(Event.model) == model)
    if kinds:
        statement = statement.where(col(Event.kind).in_(kinds))
    return list(tx.scalars(statement))


def last(tx: Session) -> int:
    """The newest number, 0 before the first event."""
    return tx.execute(select(func.max(Event.seq))).scalar_one() or 0
