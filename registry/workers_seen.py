"""The workers as they last said what they can do: where work that needs a device can go, and which kinds to measure on.

A row that is old counts for nothing, so that nobody has to say goodbye.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete, select
from sqlmodel import col

from weighbridge.registry.clock import now
from weighbridge.registry.db import Session, insert_into
from weighbridge.registry.jobs import unmet
from weighbridge.registry.lifecycle import QUEUES, Stage, kind_queue
from weighbridge.registry.models import Host, WorkerNode

LIVE_SECONDS = 120.0
"""A worker that said nothing for this long is not there."""
_KEPT_SECONDS = 7 * 86400.0
GPU = "gpu"
"""The queue of the workers that have CUDA."""


def seen(
    tx: Session, owner: str, *, machine: str, queues: Sequence[str], kind: str, hardware: Mapping[str, Any]
) -> None:
    """Note what a worker can do, by the database's clock; rows older than a week go."""
    said = {"machine": machine, "queues": list(queues), "kind": kind, "hardware": dict(hardware), "seen_at": now()}
    noted = insert_into(tx, WorkerNode).values(owner=owner, **said)
    tx.execute(noted.on_conflict_do_update(index_elements=[col(WorkerNode.owner)], set_=said))
    tx.execute(delete(WorkerNode).where(col(WorkerNode.seen_at) < now() - _KEPT_SECONDS))


def gone(tx: Session, owner: str) -> None:
    """The worker ends in order: nothing is sent for it any more."""
    tx.execute(delete(WorkerNode).where(col(WorkerNode.owner) == owner))


def live(tx: Session, within: float = LIVE_SECONDS) -> list[WorkerNode]:
    """The workers that were seen within so many seconds, by their names."""
    statement = select(WorkerNode).where(col(WorkerNode.seen_at) >= now() - within).order_by(col(WorkerNode.owner))
    return list(tx.scalars(statement, execution_options={"populate_existing": True}))


def kinds(tx: Session, within: float = LIVE_SECONDS) -> dict[str, dict[str, Any]]:
    """The kinds of device of the live workers that take variant work, with their hardware."""
    return {row.kind: row.hardware for row in live(tx, within) if row.kind and _takes_variants(row)}


def measured_kinds(tx: Session) -> list[str]:
    """The kinds of device that a version is measured on: those of live workers that some host has too.

    Where no kind is both, those of the workers: a figure of another kind is better than none.
    """
    workers = kinds(tx)
    devices = tx.scalars(select(col(Host.device)).where(col(Host.state) == "enrolled"))
    hosts = {str(device.get("kind") or "") for device in devices} if workers else set()
    return sorted(hosts & workers.keys() or workers)


def can(tx: Session, needs: Mapping[str, Any], queue: str | None = None) -> bool:
    """Whether a live worker (of that queue) has what a job needs."""
    return any(
        not unmet(needs, capabilities(row)) and (queue is None or queue in row.queues)
        for row in live(tx)
        if _takes_variants(row)
    )


def capabilities(row: WorkerNode) -> dict[str, Any]:
    """What a worker has, in the words of `jobs.claim`."""
    hardware = row.hardware
    return {"device": hardware.get("device"), "kind": row.kind, "memory": hardware.get("memory_bytes")}


def _takes_variants(row: WorkerNode) -> bool:
    return not {QUEUES[Stage.COMPRESS], GPU, kind_queue(row.kind)}.isdisjoint(row.queues)
