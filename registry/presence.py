"""Who was heard of last, and what cannot be reached: by the database's clock, whatever clocks the machines have."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlmodel import col

from weighbridge.registry import db, events, leases
from weighbridge.registry.db import Session
from weighbridge.registry.models import Event, Lease

_DAEMON = "daemon"
_AWAY, _BACK = "store.away", "store.back"
_MISSED = 3
"""Signs of life that may be missed."""


@dataclass(frozen=True, slots=True)
class Away:
    """A store that daemons cannot reach. `since`: seconds of the database's clock."""

    store: str
    reason: str
    since: float


def daemon(tx: Session, owner: str, *, store: str, trouble: str, seconds: float) -> bool:
    """A daemon is there, says so every `seconds`, and reaches its store or has `trouble` with it. True: that is news.

    Of several daemons the one that holds the lease speaks.
    """
    if leases.acquire(tx, _DAEMON, owner, _MISSED * seconds) is None:
        return False
    before = _told(tx).get(store)
    if trouble and (before is None or before.kind == _BACK):
        events.record(tx, _AWAY, subject="store", after={"store": store}, actor="daemon", reason=trouble)
        return True
    if not trouble and before is not None and before.kind == _AWAY:
        events.record(tx, _BACK, subject="store", after={"store": store}, actor="daemon")
        return True
    return False


def daemon_silent(tx: Session) -> float | None:
    """Seconds since the last daemon should have given a sign of life; 0 while one is there, None: none ever was."""
    until = tx.scalars(select(col(Lease.until)).where(col(Lease.name) == _DAEMON)).one_or_none()
    return None if until is None else max(0.0, db.clock(tx) - until)


def away(tx: Session) -> list[Away]:
    """The stores that cannot be reached now."""
    told = sorted(_told(tx).items())
    return [Away(store, event.reason, event.created_at) for store, event in told if event.kind == _AWAY]


def _told(tx: Session) -> dict[str, Event]:
    """What was told last of each store."""
    found: dict[str, Event] = {}
    told = select(Event).where(col(Event.kind).in_((_AWAY, _BACK))).order_by(col(Event.id).desc()).limit(100)
    for event in tx.scalars(told):
        found.setdefault(event.after["store"], event)
    return found
