"""Jobs: one row per stage and subject, claimed under a lease; the attempt's number is the fence of every outcome.

A message of the broker is only a hint to claim. Times are the database's, in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Update, and_, case, func, literal, or_, select, update
from sqlmodel import col

from weighbridge.registry import events
from weighbridge.registry.clock import now
from weighbridge.registry.db import Session, insert_or_skip
from weighbridge.registry.errors import FencedOut, NotFound
from weighbridge.registry.lifecycle import QUEUES, JobState, Stage, Verdict
from weighbridge.registry.models import Job, Variant

_DUE = and_(col(Job.state) == JobState.QUEUED, col(Job.not_before) <= now())
_EXPIRED = and_(col(Job.state) == JobState.RUNNING, col(Job.lease_until) <= now())
_USED_UP = col(Job.attempt) >= col(Job.max_attempts)
MOST_DEATHS = 2
"""A job in the middle of which so many workers ended is set aside: a third would end too."""
_DEADLY = col(Job.deaths) >= MOST_DEATHS
_ASIDE = "set aside: "
_DIED = f"{MOST_DEATHS} workers ended in the middle of it, the last one so: "
_PAST_THE_SESSION = {"synchronize_session": False}
_NO_LEASE: dict[str, Any] = {"lease_owner": None, "lease_until": None, "sent_at": None}
_ELSEWHERE_SECONDS = 5.0
"""A job that one worker cannot run is due again after this, for another one."""
_OF_VARIANT = col(Job.subject_type) == "variant"
_VERSION_OF = select(col(Variant.version_id)).where(col(Variant.id) == col(Job.subject_id)).scalar_subquery()
_URGENT = (case((_OF_VARIANT, 1), else_=0), case((_OF_VARIANT, _VERSION_OF), else_=0).desc(), col(Job.id))
"""Versions before variants; of these the newest version's first: nobody waits for an old one's."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right of one attempt to work on a job, for as long as it reports."""

    job_id: int
    attempt: int
    owner: str
    subject_type: str
    subject_id: int
    stage: Stage
    part: str = ""
    """A shard's number, or the kind of device to measure on."""


def insert(
    tx: Session,
    *,
    key: str,
    subject_type: str,
    subject_id: int,
    stage: Stage,
    part: str = "",
    needs: Mapping[str, Any] | None = None,
    queue: str | None = None,
    max_attempts: int = 3,
    not_before: float = 0.0,
) -> Job | None:
    """Queue a job once: None when its key is there already. `queue` None: the stage's; `needs`: see `unmet`."""
    job = Job(
        key=key,
        subject_type=subject_type,
        subject_id=subject_id,
        stage=stage,
        part=part,
        queue=queue or QUEUES[stage],
        needs=dict(needs or {}),
        max_attempts=max_attempts,
        not_before=not_before,
    )
    return insert_or_skip(tx, job)


def get(tx: Session, job_id: int) -> Job:
    """Raises NotFound."""
    job = tx.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NotFound("job", job_id)
    return job


def of(tx: Session, subject_type: str, subject_id: int, *, states: Sequence[JobState] | None = None) -> list[Job]:
    """Return a subject's jobs, oldest first."""
    statement = select(Job).where(_subject(subject_type, subject_id)).order_by(col(Job.id))
    if states is not None:
        statement = statement.where(col(Job.state).in_(states))
    return list(tx.scalars(statement, execution_options={"populate_existing": True}))


def unsent(tx: Session, queue: str, limit: int, resend_seconds: float) -> list[Job]:
    """Return due jobs of a queue that were never sent, or so long ago that the message counts as lost.

    The most urgent first. Needs a write transaction: it locks them, so that two dispatchers send different ones.
    """
    stale = or_(col(Job.sent_at).is_(None), col(Job.sent_at) <= now() - resend_seconds)
    statement = select(Job).where(col(Job.queue) == queue, _DUE, stale).order_by(*_URGENT).limit(limit)
    return list(tx.scalars(statement.with_for_update(skip_locked=True)))


def queues_due(tx: Session) -> list[str]:
    """Return the names of the queues that have due jobs, sorted."""
    return list(tx.scalars(select(col(Job.queue)).where(_DUE).distinct().order_by(col(Job.queue))))


def in_flight(tx: Session, queue: str, resend_seconds: float | None = None) -> int:
    """Count the jobs of a queue that the broker was handed and nobody has claimed yet.

    With `resend_seconds`, without those sent so long ago that their message counts as lost.
    """
    sent = [col(Job.queue) == queue, col(Job.state) == JobState.QUEUED, col(Job.sent_at).is_not(None)]
    if resend_seconds is not None:
        sent.append(col(Job.sent_at) > now() - resend_seconds)
    return tx.execute(select(func.count()).select_from(Job).where(*sent)).scalar_one()


def mark_sent(tx: Session, ids: Sequence[int]) -> None:
    """Note that these were handed to the broker just now."""
    _run(tx, update(Job).where(col(Job.id).in_(ids), col(Job.state) == JobState.QUEUED).values(sent_at=now()))


def mark_unsent(tx: Session, ids: Sequence[int]) -> None:
    """Take `mark_sent` back: the broker did not take these.

    Mark, commit, then send. The other way round, a job that is claimed and released before the mark would count as sent
    when it is due again.
    """
    _run(tx, update(Job).where(col(Job.id).in_(ids), col(Job.state) == JobState.QUEUED).values(sent_at=None))


def claim(
    tx: Session, job_id: int, owner: str, lease_seconds: float, capable: Mapping[str, Any] | None = None
) -> Claim | None:
    """Take a due job, or one whose holder's lease is over. None: it is done, held, not due, or used up (then failed).

    None too when it needs what this worker is not `capable` of ({"device", "kind", "memory"}; None takes any job): it
    says so and is due again soon, for another worker. One compare-and-set statement: of racing claimers one gets the
    row. `not_before` is 0 while it runs; see `wake`.
    """
    if capable is not None and _passed_on(tx, job_id, owner, capable):
        return None
    expire(tx, job_id)
    free = and_(col(Job.id) == job_id, _DUE)
    taken = (
        update(Job)
        .where(free, ~_USED_UP)
        .values(
            state=JobState.RUNNING,
            attempt=col(Job.attempt) + 1,
            not_before=0.0,
            lease_owner=owner,
            lease_until=now() + lease_seconds,
            started_at=func.coalesce(col(Job.started_at), now()),
            progress=0.0,
        )
    )
    columns = (col(Job.attempt), col(Job.subject_type), col(Job.subject_id), col(Job.stage), col(Job.part))
    row = tx.execute(taken.returning(*columns), execution_options=_PAST_THE_SESSION).one_or_none()
    if row is not None:
        return Claim(job_id, row.attempt, owner, row.subject_type, row.subject_id, Stage(row.stage), row.part)
    _give_up(tx, and_(free, _USED_UP))
    return None


def unmet(needs: Mapping[str, Any], capable: Mapping[str, Any]) -> str:
    """What a worker lacks for a job, in words; empty where it lacks nothing. What it does not say, it lacks."""
    lacks = [
        f"{what} {needs[what]}, it has {capable.get(what) or 'none'}"
        for what in ("device", "kind")
        if what in needs and capable.get(what) != needs[what]
    ]
    memory = needs.get("memory") or 0
    if memory > (has := capable.get("memory") or 0):
        lacks.append(f"{memory:,} bytes of memory, it has {has:,}")
    return "; ".join(lacks)


def _passed_on(tx: Session, job_id: int, owner: str, capable: Mapping[str, Any]) -> bool:
    """Leave a job that this worker cannot run to another one, if it is such a job. What a job needs never changes."""
    needs = tx.scalars(select(col(Job.needs)).where(col(Job.id) == job_id)).one_or_none()
    lacks = unmet(needs or {}, capable)
    if lacks:
        waits = update(Job).where(col(Job.id) == job_id, _DUE)
        words = f"waits for another worker: {owner} cannot run it: it needs {lacks}"
        _run(tx, waits.values(reason=words, not_before=now() + _ELSEWHERE_SECONDS, sent_at=None))
    return bool(lacks)


def heartbeat(tx: Session, claim: Claim, lease_seconds: float, progress: float | None = None) -> None:
    """Prolong the lease. Raises FencedOut."""
    values: dict[str, Any] = {"lease_until": now() + lease_seconds}
    if progress is not None:
        values["progress"] = progress
    _fenced(tx, claim, values)


def finish(tx: Session, claim: Claim, verdict: Verdict, reason: str, outcome: Mapping[str, Any]) -> None:
    """Record the stage's verdict: the job is done. Raises FencedOut.

    Lock the subject before this: who cancels a subject's jobs locks in that order too.
    """
    values = {"verdict": verdict, "reason": reason, "outcome": dict(outcome), "progress": 1.0}
    _fenced(tx, claim, {"state": JobState.DONE, "finished_at": now(), **values, **_NO_LEASE})


def died(tx: Session, claim: Claim, error: str, delay: float) -> None:
    """Note that it ended the process that did it: queued again in `delay` seconds, or set aside. Raises FencedOut."""
    held = update(Job).where(col(Job.id) == claim.job_id, col(Job.attempt) == claim.attempt)
    _run(tx, held.values(deaths=col(Job.deaths) + 1))
    deadly = tx.execute(select(_DEADLY).where(col(Job.id) == claim.job_id)).scalar_one()
    if deadly:
        set_aside(tx, claim, _DIED + error)
    else:
        retry(tx, claim, error, delay)


def set_aside(tx: Session, claim: Claim, why: str) -> None:
    """End it without an outcome: trying again here would end the same. Raises FencedOut."""
    reason = _ASIDE + why
    _fenced(tx, claim, {"state": JobState.SET_ASIDE, "finished_at": now(), "reason": reason, **_NO_LEASE})
    _tell(tx, JobState.SET_ASIDE, claim.job_id, claim.owner, reason)


def retry(tx: Session, claim: Claim, error: str, delay: float) -> None:
    """Queue it again in `delay` seconds, or fail it when its attempts are used up. Raises FencedOut."""
    values = {
        "state": case((_USED_UP, JobState.FAILED.value), else_=JobState.QUEUED.value),
        "finished_at": case((_USED_UP, now()), else_=None),
        "not_before": now() + delay,
        "reason": error,
    }
    state = _fenced(tx, claim, {**values, **_NO_LEASE})
    _tell(tx, "failed" if state is JobState.FAILED else "retried", claim.job_id, claim.owner, error)


def release(tx: Session, claim: Claim, until: float, reason: str = "") -> None:
    """Queue it again at `until`, or at once when it was woken meanwhile; this attempt does not count as one.

    (The bound grows instead of the attempt shrinking: the fence must never repeat.) Raises FencedOut.
    """
    due = case((col(Job.not_before) > 0, col(Job.not_before)), else_=until)
    values: dict[str, Any] = {"state": JobState.QUEUED, "max_attempts": col(Job.max_attempts) + 1, "not_before": due}
    if reason:
        values["reason"] = reason
    _fenced(tx, claim, {**values, **_NO_LEASE})


def expire(tx: Session, job_id: int | None = None) -> list[int]:
    """Take running jobs (or this one) from holders that stopped reporting: queued again, set aside, or failed.

    Return their ids.
    """
    over = _EXPIRED if job_id is None else and_(_EXPIRED, col(Job.id) == job_id)
    expired = select(col(Job.id)).where(over).order_by(col(Job.id)).with_for_update(skip_locked=True)
    ids = [one for one in tx.scalars(expired) if one is not None]
    if ids:
        mine = and_(col(Job.id).in_(ids), _EXPIRED)
        _run(tx, update(Job).where(mine).values(deaths=col(Job.deaths) + 1))
        failed = _give_up(tx, and_(mine, _DEADLY), JobState.SET_ASIDE, _ASIDE + _DIED)
        failed += _give_up(tx, and_(mine, _USED_UP))
        _run(tx, update(Job).where(mine).values(state=JobState.QUEUED, not_before=now(), **_NO_LEASE))
        for one in ids:
            if one not in failed:
                _tell(tx, "expired", one, "lease", "no heartbeat in time")
    return ids


def wake(tx: Session, subject_type: str, subject_id: int) -> int:
    """Make a subject's waiting jobs due now; return how many. A running one is due again as soon as it is released."""
    open_jobs = or_(
        and_(col(Job.state) == JobState.QUEUED, col(Job.not_before) > now()), col(Job.state) == JobState.RUNNING
    )
    woken = update(Job).where(_subject(subject_type, subject_id), open_jobs)
    queued = col(Job.state) == JobState.QUEUED
    return _run(tx, woken.values(not_before=now(), sent_at=case((queued, None), else_=col(Job.sent_at))))


def again(tx: Session, job_id: int, tries: int) -> Job:
    """Make an ended or waiting job due now, with so many more attempts; one that runs stays as it is. Raises NotFound.

    Attempts go on counting: the fence must never repeat.
    """
    anew: dict[str, Any] = {"verdict": None, "finished_at": None, "progress": 0.0, "deaths": 0, **_NO_LEASE}
    due = {"max_attempts": col(Job.attempt) + tries, "not_before": now()}
    idle = and_(col(Job.id) == job_id, col(Job.state) != JobState.RUNNING)
    _run(tx, update(Job).where(idle).values(state=JobState.QUEUED, **due, **anew))
    return get(tx, job_id)


def cancel(tx: Session, subject_type: str, subject_id: int) -> int:
    """End a subject's open jobs, running ones too (their holders are fenced out); return how many."""
    is_open = col(Job.state).in_([JobState.QUEUED, JobState.RUNNING])
    ended = update(Job).where(_subject(subject_type, subject_id), is_open)
    return _run(tx, ended.values(state=JobState.CANCELLED, finished_at=now(), **_NO_LEASE))


def _subject(subject_type: str, subject_id: int) -> Any:
    return and_(col(Job.subject_type) == subject_type, col(Job.subject_id) == subject_id)


def _give_up(tx: Session, which: Any, state: JobState = JobState.FAILED, why: str = "") -> list[int]:
    """End those that match without an outcome; return their ids."""
    last = func.coalesce(func.nullif(col(Job.reason), ""), "the worker stopped reporting")
    ended = update(Job).where(which)
    ended = ended.values(state=state, finished_at=now(), reason=literal(why) + last, **_NO_LEASE)
    given_up = tx.execute(ended.returning(col(Job.id), col(Job.reason)), execution_options=_PAST_THE_SESSION)
    ids = []
    for job_id, reason in given_up.all():
        assert job_id is not None
        _tell(tx, state, job_id, "lease", reason)
        ids.append(job_id)
    return ids


def _fenced(tx: Session, claim: Claim, values: dict[str, Any]) -> JobState:
    """Write as the holder; return the state that follows. Raises FencedOut."""
    held = (
        col(Job.id) == claim.job_id,
        col(Job.attempt) == claim.attempt,
        col(Job.lease_owner) == claim.owner,
        col(Job.state) == JobState.RUNNING,
    )
    written = update(Job).where(*held).values(**values).returning(col(Job.state))
    state = tx.execute(written, execution_options=_PAST_THE_SESSION).scalar_one_or_none()
    if state is None:
        raise FencedOut(f"job {claim.job_id}: attempt {claim.attempt} of {claim.owner} does not hold it any more")
    return JobState(state)


def _tell(tx: Session, what: str, job_id: int, actor: str, reason: str) -> None:
    events.record(tx, f"job.{what}", subject=f"job:{job_id}", actor=actor, reason=reason)


def _run(tx: Session, statement: Update) -> int:
    """Execute past the session's own copies, which nobody keeps; return the number of rows."""
    result = tx.execute(statement, execution_options=_PAST_THE_SESSION)
    return int(result.rowcount)  # type: ignore[attr-defined]
