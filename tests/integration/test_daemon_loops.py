"""Dispatch, reconcile, control and sequencing, one turn at a time, on both databases."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from fixtures.registry import record
from sqlalchemy import update
from sqlmodel import col, select

from weighbridge.daemon.dispatch import Dispatch
from weighbridge.daemon.loops import Idle
from weighbridge.daemon.reconcile import Control, Reconcile, Sequencer
from weighbridge.registry import events, jobs
from weighbridge.registry.clock import now
from weighbridge.registry.db import Database
from weighbridge.registry.lifecycle import JobState, Stage
from weighbridge.registry.models import Job, Model, Rollout, Version
from weighbridge.registry.notify import LocalNotifier


class Broker:
    """Takes the first `room` jobs of a call."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room, self.sent = room, list[int]()

    def publish(self, wanted: Sequence[Job]) -> list[int]:
        taken = [job.id for job in wanted if job.id is not None][: self.room]
        self.sent += taken
        return taken

    def close(self) -> None: ...


def insert(db: Database, count: int, *, stage: Stage = Stage.VALIDATE, start: int = 0, delay: float = 0) -> list[int]:
    """Queue jobs of no subject."""
    with db.transaction() as tx:
        made = [
            jobs.insert(tx, key=f"{stage}:{number}", subject_type="nothing", subject_id=number, stage=stage)
            for number in range(start, start + count)
        ]
        ids = [job.id for job in made if job is not None and job.id is not None]
        if delay:
            tx.execute(update(Job).where(col(Job.id).in_(ids)).values(not_before=now() + delay))
    return ids


def age(db: Database, seconds: float) -> None:
    """Let time pass for every job: the clock is the database's."""
    with db.transaction() as tx:
        shifted = {name: getattr(Job, name) - seconds for name in ("sent_at", "created_at", "lease_until")}
        tx.execute(update(Job).values(**shifted))


def test_jobs_are_sent_once_and_a_bounded_number_at_a_time(database: Database) -> None:
    """Room comes back as they are claimed; each queue has its own."""
    broker = Broker()
    dispatch = Dispatch(database, broker, in_flight=3, poll_seconds=0.25)
    wanted = insert(database, 5)
    steps = insert(database, 1, stage=Stage.ROLLOUT)
    assert dispatch.once(Idle()) == 0
    assert dispatch.once(Idle()) == 0.25
    assert sorted(broker.sent) == sorted(wanted[:3] + steps)
    with database.transaction() as tx:
        for job_id in wanted[:2]:
            assert jobs.claim(tx, job_id, "worker", 30)
    dispatch.once(Idle())
    assert sorted(broker.sent) == sorted(wanted + steps)


def test_a_lost_message_is_sent_again(database: Database) -> None:
    """Also when the lost ones filled all the room, as after a broker that came back empty."""
    broker = Broker()
    dispatch = Dispatch(database, broker, in_flight=2, resend_seconds=60)
    wanted = insert(database, 3)
    dispatch.once(Idle())
    age(database, 61)
    dispatch.once(Idle())
    assert broker.sent == [*wanted[:2], *wanted[:2]]


def test_what_the_broker_did_not_take_is_sent_later(database: Database) -> None:
    """A broker that is away costs a pause, and the mark is taken back."""
    broker = Broker(room=1)
    dispatch = Dispatch(database, broker)
    wanted = insert(database, 3)
    assert dispatch.once(Idle()) == 1.0
    broker.room = 5
    dispatch.once(Idle())
    assert broker.sent == wanted


def test_two_dispatchers_send_each_job_once(database: Database) -> None:
    """Whoever marks it sends it."""
    broker = Broker()
    wanted = insert(database, 10)
    for dispatch in (Dispatch(database, broker), Dispatch(database, broker)):
        dispatch.once(Idle())
    assert sorted(broker.sent) == wanted


def test_jobs_that_are_not_due_wait(database: Database) -> None:
    """`not_before` is kept."""
    broker = Broker()
    insert(database, 1, delay=60)
    Dispatch(database, broker).once(Idle())
    assert broker.sent == []


def test_a_silent_worker_loses_its_job_and_the_second_one_is_the_last(database: Database) -> None:
    """The lease is over: queued again; then the job is set aside, and the version says so. That is no verdict."""
    with database.transaction() as tx:
        recorded = record(tx)
        [job] = recorded.jobs
    assert job.id is not None
    reconcile = Reconcile(database, LocalNotifier())
    for _ in range(jobs.MOST_DEATHS):
        with database.transaction() as tx:
            assert jobs.claim(tx, job.id, "worker", 30) is not None
        age(database, 31)
        reconcile.once(Idle())
    with database.read() as tx:
        version = tx.get_one(Version, recorded.version.id)
        assert tx.get_one(Job, job.id).state == JobState.SET_ASIDE
    assert version.status == "discovered"
    assert "did not finish" in version.reason


def test_a_version_whose_plan_was_lost_goes_on(database: Database) -> None:
    """Its job is gone, as by a hand in the database: it gets one again, once."""
    with database.transaction() as tx:
        recorded = record(tx)
    with database.transaction() as tx:
        tx.delete(tx.get_one(Job, recorded.jobs[0].id))
    for _ in range(2):
        Reconcile(database, LocalNotifier()).once(Idle())
    with database.read() as tx:
        [job] = tx.scalars(select(Job)).all()
    assert job.key == f"version:{recorded.version.id}:validate:1"


@pytest.fixture
def rollout(database: Database) -> int:
    """A rollout under way that has no hosts and no job."""
    with database.transaction() as tx:
        recorded = record(tx)
        tx.delete(tx.get_one(Job, recorded.jobs[0].id))
        model = tx.scalars(select(Model)).one()
        assert model.id is not None
        version = tx.get_one(Version, recorded.version.id)
        version.status = "ready"
        row = Rollout(model_id=model.id, number=1, created_at=0.0)
        tx.add(row)
        tx.flush()
        assert row.id is not None
        return row.id


def test_every_rollout_under_way_has_a_step_to_do(database: Database, rollout: int) -> None:
    """One that lost its job gets it again, once; one whose attempts were used up gets a new step."""
    reconcile = Reconcile(database, LocalNotifier())
    reconcile.once(Idle())
    reconcile.once(Idle())
    with database.transaction() as tx:
        [job] = jobs.of(tx, "rollout", rollout)
        job.state = JobState.FAILED
    reconcile.once(Idle())
    with database.read() as tx:
        open_jobs = jobs.of(tx, "rollout", rollout, states=[JobState.QUEUED])
    assert [job.key for job in open_jobs] == [f"rollout:{rollout}:step:2"]


def test_a_rollout_step_that_no_worker_takes_is_run_here(database: Database, rollout: int) -> None:
    """After its time, under the same lease: a dead broker or a busy worker does not hold up a roll back."""
    Reconcile(database, LocalNotifier()).once(Idle())
    control = Control(database, LocalNotifier(), "daemon", seconds=2)
    control.once(Idle())
    with database.read() as tx:
        [job] = jobs.of(tx, "rollout", rollout)
    assert job.attempt == 0, "it is not its time yet"
    with database.transaction() as tx:
        tx.execute(update(Job).values(created_at=now() - 3, not_before=0.0))
    control.once(Idle())
    with database.read() as tx:
        assert tx.get_one(Rollout, rollout).status == "holding", "there is no host to roll it out to"


def test_events_are_numbered_and_told_once_more(database: Database) -> None:
    """Watchers wait for the ring that follows the numbers."""
    with database.transaction() as tx:
        record(tx)
    notifier = LocalNotifier()
    sequencer = Sequencer(database, notifier, "daemon", poll_seconds=0.25)
    with notifier.listen("events") as bell:
        assert sequencer.once(Idle()) == 0
        assert bell.wait(0)
        assert sequencer.once(Idle()) == 0.25
        assert not bell.wait(0)
    with database.read() as tx:
        assert [event.seq for event in events.read(tx, 0, 100)] == list(range(1, events.last(tx) + 1))
