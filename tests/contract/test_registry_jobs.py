"""Jobs on both databases: claimed once, fenced, never lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from weighbridge.registry import db, events, jobs, leases
from weighbridge.registry.db import Database
from weighbridge.registry.errors import FencedOut, NotFound
from weighbridge.registry.jobs import Claim
from weighbridge.registry.lifecycle import JobState, Stage, Verdict


def queue(database: Database, *, key: str = "version:1:validate:1", not_before: float = 0.0) -> int:
    with database.transaction() as tx:
        job = jobs.insert(
            tx,
            key=key,
            subject_type="version",
            subject_id=1,
            stage=Stage.VALIDATE,
            max_attempts=2,
            not_before=not_before,
        )
        assert job is not None
        assert job.id is not None
    return job.id


def take(database: Database, job_id: int, owner: str = "worker-a", seconds: float = 30) -> Claim:
    with database.transaction() as tx:
        claim = jobs.claim(tx, job_id, owner, seconds)
    assert claim is not None
    return claim


def state(database: Database, job_id: int) -> JobState:
    with database.read() as tx:
        return JobState(jobs.get(tx, job_id).state)


def test_a_key_is_queued_once(database: Database) -> None:
    """Inserting the same key again answers None and disturbs nothing."""
    queue(database)
    with database.transaction() as tx:
        again = jobs.insert(tx, key="version:1:validate:1", subject_type="version", subject_id=1, stage=Stage.VALIDATE)
        assert again is None
        assert len(jobs.of(tx, "version", 1)) == 1


def test_racing_claimers_get_it_once(database: Database, open_again: Callable[[], Database]) -> None:
    """Of many processes and threads that claim at the same moment, one gets the job."""
    job_id, start = queue(database), threading.Barrier(8)
    processes = [open_again() for _ in range(4)]

    def race(number: int) -> Claim | None:
        start.wait(10)
        with processes[number % 4].transaction() as tx:
            return jobs.claim(tx, job_id, f"worker-{number}", 30)

    with ThreadPoolExecutor(8) as pool:
        claims = [claim for claim in pool.map(race, range(8)) if claim is not None]
    assert [(claim.attempt, claim.stage) for claim in claims] == [(1, Stage.VALIDATE)]


def test_a_job_not_due_is_not_claimed(database: Database) -> None:
    """`not_before` counts by the database's clock; waking makes it due and to be sent."""
    with database.read() as tx:
        later = db.clock(tx) + 3600
    job_id = queue(database, not_before=later)
    with database.transaction() as tx:
        assert jobs.claim(tx, job_id, "worker", 30) is None
        assert jobs.unsent(tx, "cpu", 10, 5) == []
        assert jobs.wake(tx, "version", 1) == 1
        assert [job.id for job in jobs.unsent(tx, "cpu", 10, 5)] == [job_id]
        assert jobs.claim(tx, job_id, "worker", 30) is not None


def test_an_outcome_is_recorded_by_its_holder_only(database: Database) -> None:
    """An attempt whose lease ended and was taken by another is fenced out of every verb."""
    job_id = queue(database)
    old = take(database, job_id, "worker-a", seconds=-1)
    new = take(database, job_id, "worker-b")
    assert (old.attempt, new.attempt) == (1, 2)
    verbs: list[Callable[[db.Session], None]] = [
        lambda tx: jobs.finish(tx, old, Verdict.REJECTED, "late", {}),
        lambda tx: jobs.heartbeat(tx, old, 30, 0.5),
        lambda tx: jobs.retry(tx, old, "late", 0),
        lambda tx: jobs.release(tx, old, 0),
    ]
    for verb in verbs:
        with database.transaction() as tx, pytest.raises(FencedOut, match=rf"job {job_id}: attempt 1 of worker-a"):
            verb(tx)
    with database.transaction() as tx:
        jobs.finish(tx, new, Verdict.PASSED, "fine", {"digest": "ab"})
        job = jobs.get(tx, job_id)
        assert (job.state, job.verdict, job.reason, job.outcome) == ("done", "passed", "fine", {"digest": "ab"})
    with database.transaction() as tx, pytest.raises(FencedOut):
        jobs.finish(tx, new, Verdict.PASSED, "twice", {})


def test_the_same_worker_is_fenced_from_its_own_older_attempt(database: Database) -> None:
    """A job that came back to the same worker belongs to the newer attempt, also after a release."""
    job_id = queue(database)
    old = take(database, job_id)
    with database.transaction() as tx:
        jobs.release(tx, old, 0.0)
    new = take(database, job_id)
    assert new.attempt != old.attempt
    with database.transaction() as tx, pytest.raises(FencedOut):
        jobs.finish(tx, old, Verdict.PASSED, "late", {})


def test_an_expired_lease_queues_the_job_again_and_then_sets_it_aside(database: Database) -> None:
    """A worker that stops reporting costs an attempt; the second one that does is the last: a third would end too."""
    job_id = queue(database)
    take(database, job_id, seconds=-1)
    with database.transaction() as tx:
        assert jobs.expire(tx) == [job_id]
        assert jobs.expire(tx) == []
        assert jobs.get(tx, job_id).state == JobState.QUEUED
    take(database, job_id, seconds=-1)
    with database.transaction() as tx:
        assert jobs.expire(tx) == [job_id]
        job = jobs.get(tx, job_id)
        reason = "set aside: 2 workers ended in the middle of it, the last one so: the worker stopped reporting"
        assert (job.state, job.deaths, job.reason) == (JobState.SET_ASIDE, 2, reason)
        assert job.finished_at is not None
    events.sequence(database, "daemon")
    with database.read() as tx:
        assert [event.kind for event in events.read(tx, 0, 10)] == ["job.expired", "job.set_aside"]


def test_a_deadly_job_is_set_aside_at_the_next_claim(database: Database) -> None:
    """Also without the sweeper nobody gets a third of two attempts, however many it may have."""
    job_id = queue(database)
    take(database, job_id, seconds=-1)
    take(database, job_id, seconds=-1)
    with database.transaction() as tx:
        assert jobs.claim(tx, job_id, "worker", 30) is None
    assert state(database, job_id) is JobState.SET_ASIDE


def test_a_child_that_dies_counts_as_a_worker(database: Database) -> None:
    """The first death is tried again, the second sets the job aside; a person brings it back, with both forgotten."""
    job_id = queue(database)
    with database.transaction() as tx:
        jobs.again(tx, job_id, 9)
    for expected in (JobState.QUEUED, JobState.SET_ASIDE):
        with database.transaction() as tx:
            claim = jobs.claim(tx, job_id, "worker", 30)
            assert claim is not None
            jobs.died(tx, claim, "its child was ended by signal SIGSEGV", 0)
        assert state(database, job_id) is expected
    with database.transaction() as tx:
        assert "SIGSEGV" in jobs.get(tx, job_id).reason
        assert jobs.again(tx, job_id, 3).deaths == 0
        assert jobs.claim(tx, job_id, "worker", 30) is not None


def test_a_heartbeat_keeps_the_lease(database: Database) -> None:
    """A prolonged lease does not expire; progress is there to look at."""
    job_id = queue(database)
    claim = take(database, job_id, seconds=-1)
    with database.transaction() as tx:
        jobs.heartbeat(tx, claim, 60, progress=0.25)
        assert jobs.expire(tx) == []
        assert jobs.get(tx, job_id).progress == 0.25


def test_a_retry_waits_and_counts(database: Database) -> None:
    """An error that may pass queues the job again; the last attempt's error fails it."""
    job_id = queue(database)
    with database.transaction() as tx:
        first = jobs.claim(tx, job_id, "worker", 30)
        assert first is not None
        jobs.retry(tx, first, "the store did not answer", 0)
        assert (jobs.get(tx, job_id).state, jobs.get(tx, job_id).reason) == ("queued", "the store did not answer")
    second = take(database, job_id)
    with database.transaction() as tx:
        jobs.retry(tx, second, "still not", 0)
    assert state(database, job_id) is JobState.FAILED


def test_a_release_does_not_use_up_attempts(database: Database) -> None:
    """A rollout step that waits is released a hundred times and still runs."""
    job_id = queue(database)
    with database.transaction() as tx:
        for _ in range(10):
            claim = jobs.claim(tx, job_id, "worker", 30)
            assert claim is not None
            jobs.release(tx, claim, 0.0)
    assert state(database, job_id) is JobState.QUEUED


def test_a_wake_while_it_runs_is_not_lost(database: Database) -> None:
    """What woke a running job makes it due as soon as it is released, whatever it wanted to wait for."""
    job_id = queue(database)
    claim = take(database, job_id)
    with database.transaction() as tx:
        jobs.wake(tx, "version", 1)
        later = db.clock(tx) + 3600
        jobs.release(tx, claim, later)
    again = take(database, job_id)
    with database.transaction() as tx:
        jobs.release(tx, again, later)
        assert jobs.claim(tx, job_id, "worker", 30) is None


def test_a_cancelled_job_fences_its_holder(database: Database) -> None:
    """Nobody needs the outcome: it is not recorded, and the job is not claimed again."""
    job_id = queue(database)
    claim = take(database, job_id)
    with database.transaction() as tx:
        assert jobs.cancel(tx, "version", 1) == 1
    with database.transaction() as tx, pytest.raises(FencedOut):
        jobs.finish(tx, claim, Verdict.PASSED, "fine", {})
    with database.transaction() as tx:
        assert jobs.claim(tx, job_id, "worker", 30) is None
    assert state(database, job_id) is JobState.CANCELLED


def test_what_was_sent_is_sent_again_when_nobody_claims_it(database: Database) -> None:
    """A message lost by the broker costs the resend time; what is in flight is counted to bound it."""
    ids = [queue(database, key=f"version:1:validate:{number}") for number in range(3)]
    with database.transaction() as tx:
        assert [job.id for job in jobs.unsent(tx, "cpu", 2, 30)] == ids[:2]
        assert jobs.unsent(tx, "gpu", 10, 30) == []
        jobs.mark_sent(tx, ids[:2])
        assert jobs.in_flight(tx, "cpu") == 2
        assert [job.id for job in jobs.unsent(tx, "cpu", 10, 30)] == ids[2:]
        assert [job.id for job in jobs.unsent(tx, "cpu", 10, 0)] == ids
    take(database, ids[0])
    with database.read() as tx:
        assert jobs.in_flight(tx, "cpu") == 1


def test_a_job_goes_to_a_worker_that_can_run_it(database: Database) -> None:
    """One that lacks a device, the kind or memory leaves it, with the reason, for another; no attempt is used up."""
    needs = {"device": "cuda", "kind": "h100", "memory": 1 << 30}
    with database.transaction() as tx:
        job = jobs.insert(
            tx,
            key="variant:1:benchmark:h100:1",
            subject_type="variant",
            subject_id=1,
            stage=Stage.BENCHMARK,
            part="h100",
            needs=needs,
            queue="kind.h100",
        )
        assert job is not None
        assert job.id is not None
        assert jobs.queues_due(tx) == ["kind.h100"]
        jobs.mark_sent(tx, [job.id])
        small = {"device": "cpu", "kind": "xeon", "memory": 1 << 20}
        assert jobs.claim(tx, job.id, "small", 30, small) is None
        left = jobs.get(tx, job.id)
        assert (left.state, left.attempt, left.sent_at) == ("queued", 0, None)
        assert left.reason == (
            "waits for another worker: small cannot run it: it needs device cuda, it has cpu; kind h100, it has xeon; "
            "1,073,741,824 bytes of memory, it has 1,048,576"
        )
        assert jobs.queues_due(tx) == []
        assert 0 < left.not_before - db.clock(tx) < 10
        jobs.wake(tx, "variant", 1)
        claim = jobs.claim(tx, job.id, "big", 30, {**needs, "memory": 1 << 40})
        assert claim is not None
        assert (claim.part, claim.stage, claim.attempt) == ("h100", Stage.BENCHMARK, 1)


def test_a_job_without_needs_goes_to_anyone(database: Database) -> None:
    """And one that nobody says anything about is claimed as ever."""
    assert jobs.unmet({}, {}) == ""
    assert jobs.unmet({"kind": "a"}, {"device": "cpu"}) == "kind a, it has none"
    job_id = queue(database)
    with database.transaction() as tx:
        assert jobs.claim(tx, job_id, "worker", 30, {"device": "cpu"}) is not None
        assert jobs.claim(tx, 99, "worker", 30, {"device": "cpu"}) is None


def test_two_dispatchers_send_different_jobs(postgres_url: str) -> None:
    """On PostgreSQL a dispatcher skips what another is about to send. (On SQLite it waits for it.)"""
    database = Database(postgres_url)
    ids = [queue(database, key=f"version:1:validate:{number}") for number in range(4)]
    with database.transaction() as one, database.transaction() as other:
        assert [job.id for job in jobs.unsent(one, "cpu", 2, 30)] == ids[:2]
        assert [job.id for job in jobs.unsent(other, "cpu", 10, 30)] == ids[2:]
    database.close()


def test_an_unknown_job_is_named(database: Database) -> None:
    """The error says which."""
    with database.read() as tx, pytest.raises(NotFound, match="no job 7"):
        jobs.get(tx, 7)


def test_a_lease_has_one_owner(database: Database) -> None:
    """Others wait for its end or its release; the epoch grows with each change of owner, and not with a renewal."""
    with database.transaction() as tx:
        assert leases.acquire(tx, "sequencer", "a", 30) == 1
        assert leases.acquire(tx, "sequencer", "b", 30) is None
        assert leases.acquire(tx, "sequencer", "a", -1) == 1
        assert leases.acquire(tx, "sequencer", "b", 30) == 2
        leases.release(tx, "sequencer", "a", 1)
        assert leases.acquire(tx, "sequencer", "a", 30) is None
        leases.release(tx, "sequencer", "b", 2)
        assert leases.acquire(tx, "sequencer", "a", 30) == 3
        assert leases.acquire(tx, "other", "b", 30) == 1


def test_racing_for_a_lease_one_gets_it(database: Database) -> None:
    """Eight ask at the same moment for a lease that nobody ever held."""
    start = threading.Barrier(8)

    def race(number: int) -> int | None:
        start.wait(10)
        with database.transaction() as tx:
            return leases.acquire(tx, "sequencer", f"daemon-{number}", 30)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(str(epoch) for epoch in pool.map(race, range(8))) == ["1", *["None"] * 7]


def test_jobs_tell_their_troubles(database: Database) -> None:
    """A retry is an event with the error, and so is the failure of the last attempt."""
    job_id = queue(database)
    for error in ("the store did not answer", "still not"):
        claim = take(database, job_id)
        with database.transaction() as tx:
            jobs.retry(tx, claim, error, 0)
    events.sequence(database, "daemon")
    with database.read() as tx:
        told = events.read(tx, 0, 10)
    assert [(event.kind, event.subject, event.reason) for event in told] == [
        ("job.retried", f"job:{job_id}", "the store did not answer"),
        ("job.failed", f"job:{job_id}", "still not"),
    ]
