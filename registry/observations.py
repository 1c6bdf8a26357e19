"""What a host says that it holds: fenced by its epoch, counted once, and told to the rollout that waits for it."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlmodel import col

from weighbridge.registry import db, hosts, jobs
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Conflict, NotFound, StaleEpoch
from weighbridge.registry.models import Assignment, Host, Model
from weighbridge.registry.schemas import Interval, Observed, ObservedModel, ObservedSlot, Slot

BACK_AFTER = 10.0
"""A host that was silent for this many seconds is news again."""


def observe(tx: Session, host_id: str, report: Observed) -> bool:
    """Record a report, whole; say whether a rollout was woken for it.

    Raises NotFound, StaleEpoch when a newer process of this host is enrolled, Conflict when the registry does not know
    this epoch or the host is retired (both: enrol again).
    """
    host = hosts.lock(tx, host_id)
    if host is None:
        raise NotFound("host", host_id)
    _fence(host, report.epoch)
    now = db.clock(tx)
    back = host.seen_at is None or now - host.seen_at > BACK_AFTER
    host.seen_at = now
    tx.add(host)
    reported = {model.model: model for model in report.models}
    rows = tx.execute(
        select(Assignment, col(Model.name))
        .join(Model, col(Model.id) == col(Assignment.model_id))
        .where(col(Assignment.host_id) == host_id)
    ).all()
    woken = False
    for row, name in rows:
        news = _record(row, reported.get(name), report.epoch, now)
        tx.add(row)
        if (news or back) and row.rollout_id is not None:
            jobs.wake(tx, "rollout", row.rollout_id)
            woken = True
    return woken


def _fence(host: Host, epoch: int) -> None:
    if host.state != "enrolled":
        raise Conflict(f"host {host.id} is retired")
    if epoch < host.epoch:
        raise StaleEpoch(f"host {host.id} runs as epoch {host.epoch}: this process, epoch {epoch}, must end")
    if epoch > host.epoch:
        raise Conflict(f"host {host.id} is at epoch {host.epoch}, {epoch} is not known here: enrol again")


def _record(row: Assignment, seen: ObservedModel | None, epoch: int, now: float) -> bool:
    """Take over what is said of one model; say whether it is news for a rollout."""
    before = _states(row.observed)
    row.observed = seen.model_dump(mode="json") if seen else {}
    row.observed_at = now
    news = _states(row.observed) != before
    if seen is None or seen.generation != row.generation:
        return news
    live = [slot for slot in _held(row, seen) if slot is not None]
    errors = _count(row, epoch, [slot.interval for slot in live if slot.interval is not None])
    if row.live_at is None and _is_live(row, seen):
        row.live_at = now
        news = True
    return news or errors > 0


def _states(observed: dict[str, object]) -> object:
    """What matters of a report: everything but the counters."""
    slots = observed.get("slots")
    kept = [
        {key: value for key, value in slot.items() if key != "interval"}
        for slot in (slots if isinstance(slots, list) else [])
    ]
    return observed.get("generation"), kept


def _held(row: Assignment, seen: ObservedModel) -> Iterable[ObservedSlot | None]:
    """For each slot that should be live: what the host says of it, None when it says nothing."""
    found = {(slot.version, slot.variant, slot.artifact): slot for slot in seen.slots}
    for wanted in map(Slot.model_validate, row.slots):
        if wanted.role == "live":
            yield found.get((wanted.version, wanted.variant, wanted.artifact))


def _is_live(row: Assignment, seen: ObservedModel) -> bool:
    held = list(_held(row, seen))
    return bool(held) and all(slot is not None and slot.state == "live" and slot.golden == "passed" for slot in held)


def _count(row: Assignment, epoch: int, intervals: list[Interval]) -> int:
    """Add what was not counted yet; return the new errors. A repeated report carries an interval id again."""
    if not intervals:
        return 0
    last = _order(row.last_interval)
    fresh = [interval for interval in intervals if _order(f"{epoch}:{interval.id}") > last]
    row.requests += sum(interval.requests for interval in fresh)
    row.errors += sum(interval.errors for interval in fresh)
    row.input_errors += sum(interval.input_errors for interval in fresh)
    row.refused += sum(interval.refused for interval in fresh)
    row.last_interval = max((row.last_interval, *(f"{epoch}:{interval.id}" for interval in fresh)), key=_order)
    return sum(interval.errors for interval in fresh)


def _order(interval: str) -> tuple[int, int, str]:
    """`epoch:id` as it grows: ids count up, as decimal numbers or as text of one length."""
    epoch, _, name = interval.partition(":")
    return (int(epoch) if epoch else -1), len(name), name
