"""Whatever dies, the database decides: every job ends, and its stage's outcome counts once."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.broker import Valkey
from fixtures.registry import record
from fixtures.worker import StartWorker, runs, until

from weighbridge.registry import jobs, versions
from weighbridge.registry.db import Database
from weighbridge.registry.lifecycle import JobState, VersionStatus
from weighbridge.registry.settings import BrokerSettings
from weighbridge.workers import queue

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(valkey: Valkey) -> BrokerSettings:
    return valkey.settings(f"test-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def sender(broker: BrokerSettings) -> Iterator[queue.Sender]:
    opened = queue.make_sender(broker)
    yield opened
    opened.close()


def new_versions(db: Database, *names: str) -> None:
    for name in names:
        with db.transaction() as tx:
            record(tx, name)


def sweep(db: Database, sender: queue.Sender, resend_seconds: float = 1.0) -> None:
    """What the daemon's loops do: take jobs from the dead, send what is due and unsent."""
    with db.transaction() as tx:
        jobs.expire(tx)
        due = jobs.unsent(tx, "cpu", 100, resend_seconds)
    queue.send(db, sender, due)


def all_ready(db: Database, sender: queue.Sender, count: int) -> bool:
    sweep(db, sender)
    with db.read() as tx:
        return [versions.get(tx, "digits", n + 1).status for n in range(count)] == [VersionStatus.READY] * count


def first_attempts(db: Database, count: int) -> list[int]:
    with db.read() as tx:
        return [jobs.get(tx, job_id).attempt for job_id in range(1, count + 1)]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_worker_killed_in_mid_job(
    database: Database, broker: BrokerSettings, sender: queue.Sender, start_worker: StartWorker, tmp_path: Path
) -> None:
    """The lease runs out, another worker runs the job again, and it ends once."""
    new_versions(database, "slow")
    doomed = start_worker(database.url_safe, broker, lease_seconds=1)
    sweep(database, sender)
    until("the stage runs", lambda: doomed.lines() == ["start 1 1"])
    doomed.kill()
    start_worker(database.url_safe, broker, lease_seconds=1)
    (tmp_path / "go").touch()
    until("ready", lambda: all_ready(database, sender, 1))
    assert doomed.lines()[:3] == ["start 1 1", "start 1 2", "end 1 2"]
    with database.read() as tx:
        job = jobs.get(tx, 1)
        assert (job.state, job.attempt, job.reason) == (JobState.DONE, 2, "attempt 2")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_worker_that_only_seemed_dead_is_fenced(
    database: Database, broker: BrokerSettings, sender: queue.Sender, start_worker: StartWorker, tmp_path: Path
) -> None:
    """A stopped process loses its job; when it goes on, its outcome is discarded."""
    new_versions(database, "slow")
    stopped = start_worker(database.url_safe, broker, lease_seconds=1, queues=["cpu"], concurrency=1)
    sweep(database, sender)
    until("the stage runs", lambda: stopped.lines() == ["start 1 1"])
    family = stopped.pids()
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    start_worker(database.url_safe, broker, lease_seconds=1)
    until("the other runs it", lambda: (sweep(database, sender), "start 1 2" in stopped.lines())[1])
    for pid in family:
        os.kill(pid, signal.SIGCONT)
    (tmp_path / "go").touch()
    until("ready", lambda: all_ready(database, sender, 1))
    with database.read() as tx:
        assert jobs.get(tx, 1).reason == "attempt 2"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_broker_that_comes_back_empty(
    database: Database, valkey: Valkey, broker: BrokerSettings, sender: queue.Sender, start_worker: StartWorker
) -> None:
    """Jobs whose messages are gone are sent again; the worker finds the new broker by itself."""
    names = [f"{index}" for index in range(10)]
    new_versions(database, *names)
    sweep(database, sender)  # the messages of these will be lost
    valkey.kill()
    sweep(database, sender, 0)  # nobody hears
    running = start_worker(database.url_safe, broker)
    valkey.start()
    until("all are ready", lambda: all_ready(database, sender, len(names)), 60)
    valkey.kill()
    valkey.start()
    new_versions(database, "late")
    until("the late one is ready", lambda: all_ready(database, sender, len(names) + 1), 60)
    assert first_attempts(database, len(names)) == [1] * len(names)
    assert len(running.lines()) == 4 * (len(names) + 1)
    assert running.stop() == 0


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_terminated_worker_ends_its_job_first(
    database: Database, broker: BrokerSettings, sender: queue.Sender, start_worker: StartWorker, tmp_path: Path
) -> None:
    """SIGTERM takes no new jobs and waits for the running one."""
    new_versions(database, "slow", "next")
    running = start_worker(database.url_safe, broker, concurrency=1, queues=["cpu"], shutdown_seconds=10)
    sweep(database, sender)
    until("the stage runs", lambda: running.lines() == ["start 1 1"])
    running.process.terminate()
    (tmp_path / "go").touch()
    assert running.process.wait(15) == 0
    assert running.lines() == ["start 1 1", "end 1 1"]
    with database.read() as tx:
        assert jobs.get(tx, 1).state == JobState.DONE
        assert jobs.get(tx, 2).state == JobState.QUEUED


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_job_that_does_not_end_is_killed_at_the_deadline(
    database: Database, broker: BrokerSettings, sender: queue.Sender, start_worker: StartWorker
) -> None:
    """After `shutdown_seconds` everything is gone; the job stays with its lease, to be run again."""
    new_versions(database, "slow")
    running = start_worker(database.url_safe, broker, lease_seconds=1, shutdown_seconds=0.5)
    sweep(database, sender)
    until("the stage runs", lambda: running.lines() == ["start 1 1"])
    family = running.pids()
    assert running.stop() == 0
    until("everything is gone", lambda: not any(runs(pid) for pid in family))
    with database.read() as tx:
        assert jobs.get(tx, 1).state == JobState.RUNNING


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_children_do_not_outlive_their_supervisor(
    database: Database, broker: BrokerSettings, sender: queue.Sender, start_worker: StartWorker, tmp_path: Path
) -> None:
    """When only the supervisor is killed its processes end their jobs and then themselves."""
    new_versions(database, "slow")
    running = start_worker(database.url_safe, broker)
    sweep(database, sender)
    until("the stage runs", lambda: running.lines() == ["start 1 1"])
    family = running.pids()
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    (tmp_path / "go").touch()
    until("everything is gone", lambda: not any(runs(pid) for pid in family))
    with database.read() as tx:
        assert (jobs.get(tx, 1).state, jobs.get(tx, 1).attempt) == (JobState.DONE, 1)
