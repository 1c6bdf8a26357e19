"""What must be single among equal processes: a row with an owner, an end by the database's clock, and an epoch.

The epoch grows with every change of owner. Work under a lease checks it in the transaction that writes: `acquire` again
there, which also locks the row until that transaction ends.
"""

from __future__ import annotations

from sqlalchemy import case, or_, update
from sqlmodel import col

from weighbridge.registry.clock import now
from weighbridge.registry.db import Session, insert_into
from weighbridge.registry.models import Lease


def acquire(tx: Session, name: str, owner: str, seconds: float) -> int | None:
    """Take or renew the lease; return its epoch, or None while somebody else holds it."""
    until = now() + seconds
    insert = insert_into(tx, Lease).values(name=name, owner=owner, epoch=1, until=until)
    statement = insert.on_conflict_do_update(
        index_elements=[col(Lease.name)],
        set_={
            "owner": owner,
            "until": until,
            "epoch": case((col(Lease.owner) == owner, col(Lease.epoch)), else_=col(Lease.epoch) + 1),
        },
        where=or_(col(Lease.owner) == owner, col(Lease.until) <= now()),
    )
    return tx.execute(statement.returning(col(Lease.epoch))).scalar_one_or_none()


def release(tx: Session, name: str, owner: str, epoch: int) -> None:
    """Give the lease up, if it is still held: the next owner need not wait for its end."""
    mine = (col(Lease.name) == name, col(Lease.owner) == owner, col(Lease.epoch) == epoch)
    tx.execute(update(Lease).where(*mine).values(owner="", until=0.0))
