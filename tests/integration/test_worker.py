"""A real worker on a real Valkey: job ids come in, verdicts go into the database, whatever else a message says."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures import forged
from fixtures.broker import Valkey
from fixtures.registry import record
from fixtures.worker import RunningWorker, StartWorker, until

from weighbridge.registry import jobs, versions
from weighbridge.registry.db import Database
from weighbridge.registry.lifecycle import JobState, VersionStatus
from weighbridge.registry.models import Job
from weighbridge.registry.settings import BrokerSettings
from weighbridge.workers import queue
from weighbridge.workers.app import TASK, InsecureBroker, check_broker, make_app, queue_name

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(shared_valkey: Valkey) -> BrokerSettings:
    return shared_valkey.settings(f"test-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def sender(broker: BrokerSettings) -> Iterator[queue.Sender]:
    opened = queue.make_sender(broker)
    yield opened
    opened.close()


@pytest.fixture
def running(database_url: str, broker: BrokerSettings, start_worker: StartWorker) -> RunningWorker:
    return start_worker(database_url, broker)


def new_version(db: Database, name: str) -> tuple[int, list[Job]]:
    with db.transaction() as tx:
        recorded = record(tx, name)
        assert recorded.version.id is not None
        return recorded.version.number, recorded.jobs


def status(db: Database, number: int) -> str:
    with db.read() as tx:
        return versions.get(tx, "digits", number).status


def test_a_sent_job_runs_and_what_follows_is_sent_at_once(
    database: Database, sender: queue.Sender, running: RunningWorker
) -> None:
    """One message starts validation; evaluation follows without a daemon; the version is ready."""
    number, first = new_version(database, "a")
    assert queue.send(database, sender, first) == 1
    until("ready", lambda: status(database, number) == VersionStatus.READY)
    assert [line.split()[0] for line in running.lines()] == ["start", "end", "start", "end"]
    assert running.stop() == 0


def test_two_workers_race_for_every_job(
    database: Database,
    database_url: str,
    broker: BrokerSettings,
    sender: queue.Sender,
    start_worker: StartWorker,
) -> None:
    """Each message arrives three times and both workers are hungry: every job runs once, no version is stuck."""
    count = 20
    first = [job for index in range(count) for job in new_version(database, str(index))[1]]
    racing = [start_worker(database_url, broker, queues=["cpu"]) for _ in range(2)]
    for _ in range(3):
        sender.publish(first)
    until("all are ready", lambda: [status(database, n + 1) for n in range(count)] == ["ready"] * count)
    lines = racing[0].lines()
    assert len(lines) == len(set(lines)) == 4 * count
    assert all(line.endswith(" 1") for line in lines), "no job needed a second attempt"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_messages_that_the_database_does_not_want(
    database: Database, broker: BrokerSettings, sender: queue.Sender, running: RunningWorker
) -> None:
    """Duplicates run once; forged ids, arguments, task names and bodies run nothing; the worker lives on."""
    number, first = new_version(database, "a")
    app = make_app(broker)
    cpu = queue_name(broker, "cpu")
    for arguments in ((10**9,), ("1; DROP TABLE job",), (True,), (None,), ({"id": 1},), (1, 2, 3), ()):
        app.send_task(TASK, args=arguments, queue=cpu)
    app.send_task("os.system", args=("true",), queue=cpu)
    with app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection)
        producer.publish(b"\x80\x04.", routing_key=cpu, content_type="application/x-python-serialize")
        producer.publish(b"{", routing_key=cpu, content_type="application/json", content_encoding="utf-8")
    for _ in range(10):
        sender.publish(first)
    until("ready", lambda: status(database, number) == VersionStatus.READY)
    for _ in range(10):
        sender.publish(first)  # done by now
    other, later = new_version(database, "b")
    queue.send(database, sender, later)
    until("the second is ready", lambda: status(database, other) == VersionStatus.READY)
    assert len(running.lines()) == 8, "four jobs, each started and ended once"
    app.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_forged_messages_neither_stop_a_worker_nor_make_it_do_anything(
    database: Database,
    broker: BrokerSettings,
    sender: queue.Sender,
    running: RunningWorker,
    shared_valkey: Valkey,
    tmp_path: Path,
) -> None:
    """A hundred of them straight into its queue: the same processes go on, a job runs once, callbacks go nowhere, and
    the log has one short line for each rule that was broken."""
    number, first = new_version(database, "a")
    queue.send(database, sender, first)
    until("ready", lambda: status(database, number) == VersionStatus.READY)
    before = set(running.pids())
    other, later = new_version(database, "b")
    with shared_valkey.client() as valkey:
        names = [queue_name(broker, name) for name in ("cpu", "control")]
        for name in names:
            for text in (*forged.wrong(), *forged.odd(later[0].id or 0), *forged.wrong()):
                valkey.lpush(name, text.encode("utf-8", "surrogateescape"))
        until("all are taken", lambda: not any(map(valkey.llen, names)), 20)
        until("the second is ready", lambda: status(database, other) == VersionStatus.READY)
        third, last = new_version(database, "c")
        queue.send(database, sender, last)
        until("the third is ready", lambda: status(database, third) == VersionStatus.READY)
        assert valkey.exists("evil", "celery") == 0
    assert before <= set(running.pids()), "no process was started again"
    assert len(running.lines()) == 12, "six jobs, each started and ended once"
    log = (tmp_path / "worker0.log").read_text()
    said = [line for line in log.splitlines() if "forged" in line]
    assert 0 < len(said) <= 2 * 12, "each process says each rule once"
    assert max(map(len, log.splitlines())) < 300
    assert "Traceback" not in log
    assert "evil" not in log


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_mistake_in_a_stage_is_retried_and_then_fails_closed(
    database: Database, broker: BrokerSettings, sender: queue.Sender, start_worker: StartWorker
) -> None:
    """Its attempts are used up with growing pauses; the version is quarantined with the words of the mistake."""
    running = start_worker(database.url_safe, broker, retry_seconds=0.01)
    number, first = new_version(database, "broken")
    queue.send(database, sender, first)

    def swept() -> bool:
        with database.transaction() as tx:
            due = jobs.unsent(tx, "cpu", 10, 60)
        queue.send(database, sender, due)
        return status(database, number) == VersionStatus.QUARANTINED

    until("quarantined", swept)
    with database.read() as tx:
        reason = versions.get(tx, "digits", number).reason
        assert jobs.get(tx, first[0].id or 0).state == JobState.FAILED
    assert reason == "validate did not finish: RuntimeError: the stage has a mistake"
    assert len(running.lines()) == 3


def test_a_broker_off_this_machine_needs_a_password() -> None:
    """Start-up refuses it; loopback and unix sockets are fine."""
    for url in ("redis://10.0.0.7:6379/0", "redis://valkey/0", "rediss://user@valkey/0"):
        with pytest.raises(InsecureBroker):
            check_broker(BrokerSettings(url=url))  # type: ignore[arg-type]
    for url in ("redis://127.0.0.1/0", "redis://[::1]/0", "redis://:s@valkey/0", "redis+socket:///s", "memory://"):
        check_broker(BrokerSettings(url=url))  # type: ignore[arg-type]
