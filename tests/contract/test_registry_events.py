"""The event feed on both databases: gapless, in order, nothing missed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from weighbridge.registry import events, leases
from weighbridge.registry.db import Database
from weighbridge.registry.models import Event


def tell(database: Database, kind: str, count: int = 1, **fields: str) -> None:
    with database.transaction() as tx:
        for _ in range(count):
            events.record(tx, kind, actor="test", **fields)  # type: ignore[arg-type]


def read_all(database: Database) -> list[Event]:
    with database.read() as tx:
        return events.read(tx, 0, 100_000)


def test_an_event_is_read_when_it_is_numbered(database: Database) -> None:
    """It keeps what it was given; the feed resumes behind any number and filters by model and kind."""
    with database.transaction() as tx:
        events.record(
            tx,
            "version.ready",
            model="digits",
            version=3,
            subject="version:17",
            before={"status": "discovered"},
            after={"status": "ready"},
            actor="worker",
            reason="fine",
        )
        events.record(tx, "host.enrolled", actor="admin")
    with database.read() as tx:
        assert events.read(tx, 0, 10) == []
        assert events.last(tx) == 0
    assert events.sequence(database, "daemon") == 2
    assert events.sequence(database, "daemon") == 0
    with database.read() as tx:
        assert events.last(tx) == 2
        assert [event.kind for event in events.read(tx, 1, 10)] == ["host.enrolled"]
        assert [event.seq for event in events.read(tx, 0, 10, model="digits")] == [1]
        (told,) = events.read(tx, 0, 10, kinds=["version.ready"])
    assert (told.version, told.subject, told.before, told.after) == (
        3,
        "version:17",
        {"status": "discovered"},
        {"status": "ready"},
    )
    assert (told.actor, told.reason) == ("worker", "fine")


def test_a_rolled_back_change_has_no_event(database: Database) -> None:
    """Events live and die with their transaction, and leave no gap."""

    def fail() -> None:
        with database.transaction() as tx:
            events.record(tx, "never", actor="test")
            tx.flush()
            raise LookupError

    tell(database, "first")
    with pytest.raises(LookupError):
        fail()
    tell(database, "second")
    events.sequence(database, "daemon")
    assert [(event.seq, event.kind) for event in read_all(database)] == [(1, "first"), (2, "second")]


def test_a_late_commit_is_not_missed(postgres_url: str) -> None:
    """A transaction that began first and commits last comes last in the feed: a watcher that was there sees it."""
    database = Database(postgres_url)
    with database.transaction() as slow:
        events.record(slow, "slow", actor="test")
        slow.flush()
        tell(database, "quick")
        assert events.sequence(database, "daemon") == 1
        with database.read() as tx:
            assert [(event.seq, event.kind) for event in events.read(tx, 0, 10)] == [(1, "quick")]
    assert events.sequence(database, "daemon") == 1
    with database.read() as tx:
        assert [(event.seq, event.kind) for event in events.read(tx, 1, 10)] == [(2, "slow")]
    database.close()


def test_nothing_is_missed_while_all_race(database: Database, open_again: Callable[[], Database]) -> None:
    """Writers, two sequencers that take the lease from each other, and a watcher: every event once, without a gap."""
    writers, each = 4, 25
    done = threading.Event()
    seen: list[tuple[int | None, str]] = []

    def write(number: int) -> None:
        for item in range(each):
            tell(database, f"event-{number}-{item}")

    def sequence(owner: str, own: Database) -> None:
        while not done.is_set():
            events.sequence(own, owner)
            with own.transaction() as tx:  # Gives the other a chance in the middle of everything.
                epoch = leases.acquire(tx, "sequencer", owner, 30)
                if epoch is not None:
                    leases.release(tx, "sequencer", owner, epoch)

    def watch() -> None:
        own = open_again()
        while len(seen) < writers * each and not done.wait(0.001):
            with own.read() as tx:
                after = seen[-1][0] if seen else 0
                seen.extend((event.seq, event.kind) for event in events.read(tx, after or 0, 10))

    watcher = threading.Thread(target=watch)
    watcher.start()
    sequencers = [threading.Thread(target=sequence, args=(name, open_again())) for name in ("one", "two")]
    for thread in sequencers:
        thread.start()
    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    watcher.join(30)
    done.set()
    for thread in sequencers:
        thread.join(30)
    assert [seq for seq, _ in seen] == list(range(1, writers * each + 1))
    assert {kind for _, kind in seen} == {f"event-{number}-{item}" for number in range(writers) for item in range(each)}


KILLED = """
import os, signal, sys
from sqlalchemy import update
from weighbridge.registry import leases
from weighbridge.registry.db import Database
from weighbridge.registry.models import Event
with Database(sys.argv[1]).transaction() as tx:
    assert leases.acquire(tx, "sequencer", "killed", 3600)
    tx.execute(update(Event).where(Event.id == 1).values(seq=1))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_sequencer_leaves_no_trace(database: Database, database_url: str) -> None:
    """Killed in the middle of numbering it held the lease only in its transaction: the next goes on at once."""
    tell(database, "first")
    tell(database, "second")
    killed = subprocess.run([sys.executable, "-c", KILLED, database_url], env=dict(os.environ), check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert events.sequence(database, "next") == 2
    assert [(event.seq, event.kind) for event in read_all(database)] == [(1, "first"), (2, "second")]


def test_another_waits_while_the_lease_is_held(database: Database) -> None:
    """One sequencer at a time; when the lease is over the other numbers on, without a gap."""
    tell(database, "first", 3)
    assert events.sequence(database, "one") == 3
    tell(database, "second")
    assert events.sequence(database, "two") == 0
    with database.transaction() as tx:
        leases.acquire(tx, "sequencer", "one", -1)
    assert events.sequence(database, "two") == 1
    assert [event.seq for event in read_all(database)] == [1, 2, 3, 4]
