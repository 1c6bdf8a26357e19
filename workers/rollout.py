"""One recorded step of a rollout: lock its row, look, ask `next_step`, and do that, all in one transaction.

Free of torch and Celery: the daemon runs a step that no worker takes.
"""

from __future__ import annotations

import logging
from dataclasses import asdict

from weighbridge.registry import champion, hosts, jobs, rollouts, stored
from weighbridge.registry.champion import Serving
from weighbridge.registry.db import Database, Session, clock
from weighbridge.registry.jobs import Claim
from weighbridge.registry.lifecycle import RolloutStatus, Verdict
from weighbridge.registry.models import Host, Job, Rollout
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy
from weighbridge.workers import observe
from weighbridge.workers.next_step import Assign, Finish, Hold, Observations, RollBack, Step, Wait, lost, next_step

log = logging.getLogger(__name__)

PACE = 1.0
"""Seconds between two looks while hosts load or bake: error counts ring no bell."""
HOLD_PACE = 2.0
IDLE_PACE = 60.0
"""While only a person can let it go on; a decision wakes it at once."""
_ENDED = frozenset({RolloutStatus.FINISHED, RolloutStatus.ROLLED_BACK, RolloutStatus.ABORTED})


def perform(db: Database, notifier: Notifier, claim: Claim, policies: tuple[Policy, ...] = ()) -> list[Job]:
    """Take the next step of the claim's rollout; return the jobs that follow, to be sent. Raises FencedOut."""
    with db.transaction() as tx:
        rollout = rollouts.lock(tx, claim.subject_id)
        if rollout.status in _ENDED:
            jobs.finish(tx, claim, Verdict.NOT_APPLICABLE, f"the rollout is {rollout.status}", {})
            return []
        try:
            with tx.begin_nested():
                rollouts.keep_served(tx, rollout)
                following = _step(tx, rollout, claim, policies)
        except stored.BROKEN as exc:
            if not stored.is_unreadable(exc):
                raise
            log.warning("rollout %s cannot be read", rollout.id, exc_info=exc)
            following = _cannot(tx, rollouts.lock(tx, claim.subject_id), claim, f"{type(exc).__name__}: {exc}")
    for topic in ("hosts", "jobs", "events"):
        notifier.ring(topic)
    return following


def _cannot(tx: Session, rollout: Rollout, claim: Claim, why: str) -> list[Job]:
    """Its rows do not say any more how to go on, nor how to go back: it holds, and ends when a person aborts it.

    Its hosts keep what they have until another rollout, or `converge`, gives them something.
    """
    reason = f"what is stored of it cannot be read ({why}); abort it, and start another"
    before, asker = rollout.status, _asker(rollout)
    ends = rollout.status == RolloutStatus.ROLLING_BACK or (rollout.request or {}).get("verb") == "abort"
    if ends:
        status = RolloutStatus.ROLLED_BACK if before == RolloutStatus.ROLLING_BACK else RolloutStatus.ABORTED
        rollout.request, rollout.finished_at = None, clock(tx)
    elif before in (RolloutStatus.RUNNING, RolloutStatus.HOLDING):
        status = RolloutStatus.HOLDING
    else:
        status = RolloutStatus(before)
    if not ends and (status, reason) == (before, rollout.reason):
        jobs.release(tx, claim, clock(tx) + IDLE_PACE)
        return []
    rollouts.move(rollout, status, reason)
    rollouts.add_step(tx, rollout, "finish" if ends else "hold", {"missing": reason}, actor=asker)
    rollouts.report(tx, rollout, status if ends else "held", before={"status": before}, actor=asker, reason=reason)
    jobs.finish(tx, claim, Verdict.PASSED, "unreadable", {"rollout": status})
    job = None if ends else rollouts.next_job(tx, rollout, not_before=clock(tx) + IDLE_PACE)
    return [job] if job is not None else []


def _step(tx: Session, rollout: Rollout, claim: Claim, policies: tuple[Policy, ...]) -> list[Job]:
    view, seen = observe.look(tx, rollout)
    _report_lost(tx, rollout, lost(view, seen))
    step = next_step(view, seen)
    if not _apply(tx, rollout, step, seen):
        jobs.release(tx, claim, _due(step, rollout, seen.now))
        return []
    jobs.finish(tx, claim, Verdict.PASSED, type(step).__name__.lower(), {"rollout": rollout.status})
    if isinstance(step, Finish):
        model_id = rollout.model_id
        after = rollouts.start_automatic(tx, model_id, policies) or rollouts.improve(tx, model_id, policies)
        return jobs.of(tx, "rollout", after.id) if after is not None and after.id is not None else []
    job = rollouts.next_job(tx, rollout)
    return [job] if job is not None else []


def _due(step: Step, rollout: Rollout, now: float) -> float:
    """When to look again without a report: rates of errors and enrolments ring nobody."""
    if isinstance(step, Hold):
        return now + HOLD_PACE
    assert isinstance(step, Wait)
    if step.until is None:
        return now + IDLE_PACE
    return max(min(step.until, now + PACE), now)


def _report_lost(tx: Session, rollout: Rollout, now_lost: tuple[str, ...]) -> None:
    """Tell once that a host fell silent, and once that it is back."""
    before = set(rollout.state.get("lost", ()))
    for host_id in sorted(set(now_lost) - before):
        rollouts.report(tx, rollout, "host_lost", after={"host": host_id}, reason=f"host {host_id} is silent")
    for host_id in sorted(before - set(now_lost)):
        rollouts.report(tx, rollout, "host_back", after={"host": host_id})
    if before != set(now_lost):
        rollout.state = {**rollout.state, "lost": sorted(now_lost)}
        tx.add(rollout)


def _apply(tx: Session, rollout: Rollout, step: Step, seen: Observations) -> bool:
    """Do it; False when there was nothing to do but to wait."""
    match step:
        case Wait():
            return _wait(tx, rollout, step, seen)
        case Hold(missing):
            return _hold(tx, rollout, missing, seen)
        case Assign():
            _assign(tx, rollout, step, seen)
        case RollBack():
            _roll_back(tx, rollout, step, seen)
        case Finish():
            _finish(tx, rollout, step, seen)
    return True


def _wait(tx: Session, rollout: Rollout, step: Wait, seen: Observations) -> bool:
    if rollout.status != RolloutStatus.HOLDING:
        return False
    rollouts.move(rollout, RolloutStatus.RUNNING, "")
    rollouts.add_step(tx, rollout, "go_on", {"waits_for": step.reason}, observations=observe.numbers(seen))
    rollouts.report(tx, rollout, "went_on", before={"status": RolloutStatus.HOLDING})
    return True


def _hold(tx: Session, rollout: Rollout, missing: str, seen: Observations) -> bool:
    if rollout.status == RolloutStatus.HOLDING and rollout.reason == missing:
        return False
    before = rollout.status
    rollouts.move(rollout, RolloutStatus.HOLDING, missing)
    rollouts.add_step(tx, rollout, "hold", {"missing": missing}, observations=observe.numbers(seen))
    rollouts.report(tx, rollout, "held", before={"status": before}, reason=missing)
    return True


def _assign(tx: Session, rollout: Rollout, step: Assign, seen: Observations) -> None:
    _give(tx, rollout, step.hosts, observe.forth(rollout))
    before = {"status": rollout.status, "wave": rollout.wave}
    rollout.wave = step.wave
    given = [*rollout.state.get("given", ()), *step.hosts]
    rollout.state = {**rollout.state, "given": given, "before": observe.marks(rollout, seen, step.hosts)}
    rollouts.move(rollout, RolloutStatus.RUNNING, "")
    rollouts.add_step(tx, rollout, "assign", asdict(step), observations=observe.numbers(seen))
    rollouts.report(tx, rollout, "wave_assigned", before=before, after={"hosts": list(step.hosts)})


def _roll_back(tx: Session, rollout: Rollout, step: RollBack, seen: Observations) -> None:
    old = observe.back(tx, rollout)
    _give(tx, rollout, step.hosts, old)
    before, actor = {"status": rollout.status}, _asker(rollout)
    rollout.request = None
    rollouts.move(rollout, RolloutStatus.ROLLING_BACK, step.reason)
    detail = {**asdict(step), "to": old.number if old else None}
    rollouts.add_step(tx, rollout, "roll_back", detail, observations=observe.numbers(seen), actor=actor)
    rollouts.report(tx, rollout, "rolling_back", before=before, after=detail, actor=actor, reason=step.reason)


def _finish(tx: Session, rollout: Rollout, step: Finish, seen: Observations) -> None:
    before, actor = {"status": rollout.status}, _asker(rollout)
    reason = "; ".join(filter(None, (rollout.reason if rollout.status == "rolling_back" else "", step.reason)))
    rollout.request, rollout.finished_at = None, seen.now
    rollouts.move(rollout, step.status, reason)
    rollouts.add_step(tx, rollout, "finish", {"status": step.status}, observations=observe.numbers(seen), actor=actor)
    rollouts.report(tx, rollout, step.status, before=before, actor=actor, reason=reason)
    tx.flush()
    if step.status is RolloutStatus.FINISHED:
        champion.crown(tx, rollout)
    champion.converge(tx, rollout.model_id)


def _give(tx: Session, rollout: Rollout, host_ids: tuple[str, ...], wanted: Serving | None) -> None:
    """Assign to each host what its kind gets; nothing at all where nothing served before."""
    assert rollout.id is not None
    for host_id in host_ids:
        host = tx.get(Host, host_id)
        if host is not None and host.state != "retired":
            slots = [wanted.slot(champion.kind(host))] if wanted is not None else []
            hosts.assign(tx, host_id, rollout.model_id, slots, rollout.id)


def _asker(rollout: Rollout) -> str:
    return (rollout.request or {}).get("actor") or "weighbridge"
