"""The task body against the real tables: claims, heartbeats, fences, and outcomes that are recorded once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fixtures.registry import record
from fixtures.worker import until

from weighbridge.registry import jobs, versions
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import FencedOut, Unavailable
from weighbridge.registry.jobs import Claim
from weighbridge.registry.lifecycle import JobState, Stage, Verdict, VersionStatus
from weighbridge.registry.notify import LocalNotifier
from weighbridge.storage.errors import AccessDenied, StorageFull, StorageUnavailable
from weighbridge.workers import rollout, tasks
from weighbridge.workers.heartbeat import Heartbeat
from weighbridge.workers.settings import WorkerSettings
from weighbridge.workers.tasks import Recorder, Stages, Worker

StageBody = Callable[[Claim, Heartbeat], Recorder]


class Scripted(Stages):
    """Stages that do what the test says."""

    def __init__(self, body: StageBody) -> None:
        self.body, self.ran = body, 0

    def run(self, claim: Claim, heartbeat: Heartbeat) -> Recorder:
        self.ran += 1
        return self.body(claim, heartbeat)


def passed(claim: Claim, _: Heartbeat) -> Recorder:
    return partial(finish, claim)


def finish(claim: Claim, tx: Session) -> None:
    jobs.finish(tx, claim, Verdict.PASSED, "fine", {})


def worker(db: Database, body: StageBody, tmp_path: Path, **settings: Any) -> Worker:
    given = WorkerSettings(cache=tmp_path, **{"retry_seconds": 0, **settings})
    return Worker(db=db, notifier=LocalNotifier(), stages=Scripted(body), settings=given, owner="test")


def first_job(db: Database, name: str = "a") -> int:
    with db.transaction() as tx:
        job_id = record(tx, name).jobs[0].id
        assert job_id is not None
        return job_id


def state(db: Database, job_id: int) -> str:
    with db.read() as tx:
        return jobs.get(tx, job_id).state


def test_a_job_runs_once_and_its_follower_is_there(database: Database, tmp_path: Path) -> None:
    """However often its id arrives; ids of nothing do nothing; everybody is told."""
    one = worker(database, passed, tmp_path)
    job_id = first_job(database)
    with one.notifier.listen("jobs", "events") as bell:
        for wanted in (job_id, job_id, 999, -1, 2**80, "1", None, True):
            one.run_job(wanted)
        assert bell.wait(0)
    assert one.stages.ran == 1  # type: ignore[attr-defined]
    with database.read() as tx:
        assert [job.stage for job in jobs.of(tx, "version", 1)] == ["validate", "evaluate"]


def test_the_outcome_of_a_lost_job_is_discarded(database: Database, tmp_path: Path) -> None:
    """Who lost the lease writes nothing: neither outcome nor error."""

    def robbed(claim: Claim, heartbeat: Heartbeat) -> Recorder:
        with database.transaction() as tx:
            jobs.cancel(tx, claim.subject_type, claim.subject_id)
        return passed(claim, heartbeat)

    def robbed_and_raising(claim: Claim, heartbeat: Heartbeat) -> Recorder:
        robbed(claim, heartbeat)
        raise RuntimeError("anything")

    for name, body in (("a", robbed), ("b", robbed_and_raising)):
        job_id = first_job(database, name)
        worker(database, body, tmp_path).run_job(job_id)
        assert state(database, job_id) == JobState.CANCELLED


def test_a_long_job_keeps_its_lease(sqlite_url: str, tmp_path: Path) -> None:
    """The heartbeat prolongs it and writes the progress; a fenced one is told through its progress."""
    database = Database(sqlite_url)
    told: list[float] = []

    def long(claim: Claim, heartbeat: Heartbeat) -> Recorder:
        heartbeat.progress(0.5)

        def beaten() -> bool:
            with database.read() as tx:
                told.append(jobs.get(tx, claim.job_id).progress)
            return told[-1] == 0.5

        until("the heartbeat", beaten)
        with database.transaction() as tx:
            assert jobs.expire(tx) == []
            jobs.cancel(tx, claim.subject_type, claim.subject_id)
        with pytest.raises(FencedOut):
            until("the fence", lambda: heartbeat.progress(0.6))
        raise FencedOut("stop")

    job_id = first_job(database)
    worker(database, long, tmp_path, lease_seconds=0.3).run_job(job_id)
    assert state(database, job_id) == JobState.CANCELLED
    database.close()


def test_a_stage_over_its_time_loses_its_job(sqlite_url: str, tmp_path: Path) -> None:
    """The heartbeat stops by itself, so that a hung stage cannot hold a job for ever."""
    database = Database(sqlite_url)

    def hung(claim: Claim, heartbeat: Heartbeat) -> Recorder:
        def expired() -> bool:
            with database.transaction() as tx:
                return bool(jobs.expire(tx))

        until("the lease is over", expired)
        return passed(claim, heartbeat)

    job_id = first_job(database)
    worker(database, hung, tmp_path, lease_seconds=0.2, stage_timeout=0.3).run_job(job_id)
    assert state(database, job_id) == JobState.QUEUED
    database.close()


def test_a_database_that_is_away_for_a_moment(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stage found is recorded when the database is back: the stage does not run again."""
    database = Database(sqlite_url)
    failures = iter([Unavailable("gone"), Unavailable("still gone")])
    opened = database.transaction
    away = threading.Event()

    @contextlib.contextmanager
    def transaction() -> Iterator[Session]:
        if away.is_set() and (failure := next(failures, None)) is not None:
            raise failure
        with opened() as tx:
            yield tx

    def body(claim: Claim, heartbeat: Heartbeat) -> Recorder:
        away.set()
        return passed(claim, heartbeat)

    job_id = first_job(database)
    monkeypatch.setattr(database, "transaction", transaction)
    one = worker(database, body, tmp_path)
    one.run_job(job_id)
    assert one.stages.ran == 1  # type: ignore[attr-defined]
    assert state(database, job_id) == JobState.DONE
    database.close()


def test_mistakes_use_up_attempts_what_lies_around_does_not(sqlite_url: str, tmp_path: Path) -> None:
    """A programming error ends in quarantine; wrong credentials wait for the operator, with the reason on the job."""
    database = Database(sqlite_url)

    def mistaken(*_: object) -> Recorder:
        raise ZeroDivisionError("division by zero")

    def refused(*_: object) -> Recorder:
        raise AccessDenied("bucket drops: 403 for this key")

    broken, waiting = first_job(database, "a"), first_job(database, "b")
    for _ in range(5):
        worker(database, mistaken, tmp_path).run_job(broken)
        worker(database, refused, tmp_path).run_job(waiting)
    with database.read() as tx:
        assert jobs.get(tx, broken).state == JobState.FAILED
        version = versions.get(tx, "digits", 1)
        assert version.status == VersionStatus.QUARANTINED
        assert version.reason == "validate did not finish: ZeroDivisionError: division by zero"
        job = jobs.get(tx, waiting)
        assert (job.state, job.attempt, job.reason) == (JobState.QUEUED, 5, "waits: bucket drops: 403 for this key")
    database.close()


def test_what_nobody_mends_is_not_asked_for_ever(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, a missing right, too many open files: set aside in the end, which is no verdict.

    A store that is away is waited for as long as it takes.
    """
    monkeypatch.setattr(tasks, "_MOST_WAITS", 3)
    database = Database(sqlite_url)
    errors = [StorageFull("disk"), AccessDenied("403"), OSError(24, "Too many open files"), StorageUnavailable("away")]
    for number, error in enumerate(errors, start=1):

        def failing(*_: object, error: Exception = error) -> Recorder:
            raise error

        job_id = first_job(database, str(number))
        for _ in range(4):
            worker(database, failing, tmp_path).run_job(job_id)
        away = isinstance(error, StorageUnavailable)
        with database.read() as tx:
            job, version = jobs.get(tx, job_id), versions.get(tx, "digits", number)
            assert (job.state, job.attempt) == ((JobState.QUEUED, 4) if away else (JobState.SET_ASIDE, 3))
            assert version.status == VersionStatus.DISCOVERED
            assert away or "set aside: gave up after 3 tries: " in version.reason
    database.close()


def test_a_rollout_never_loses_its_next_step(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in a step is tried again and again: giving up would leave a fleet between two versions."""
    database = Database(sqlite_url)

    def mistaken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(rollout, "perform", mistaken)
    with database.transaction() as tx:
        job = jobs.insert(tx, key="rollout:1:step:1", subject_type="rollout", subject_id=1, stage=Stage.ROLLOUT)
        assert job is not None
        assert job.id is not None
    for _ in range(6):
        worker(database, passed, tmp_path).run_job(job.id)
    with database.read() as tx:
        row = jobs.get(tx, job.id)
        assert (row.state, row.attempt) == (JobState.QUEUED, 6)
        assert row.reason == "ZeroDivisionError: division by zero"
    database.close()
