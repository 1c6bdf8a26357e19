"""What hosts report: fenced, counted once, and told to the rollout that waits."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures.registry import record

from weighbridge.registry import hosts, jobs, observations
from weighbridge.registry.db import Database, Session
from weighbridge.registry.lifecycle import Stage
from weighbridge.registry.models import Assignment, Host, Rollout
from weighbridge.registry.schemas import Enrolment, Observed, Slot
from weighbridge.registry.tokens import Principal

OLD, NEW = "a" * 64, "b" * 64

LOCAL = Principal("admin", "local")


class Fleet:
    """One host that was given one version, by a rollout whose step waits for long."""

    def __init__(self, db: Database) -> None:
        self.db = db
        with db.transaction() as tx:
            self.host = hosts.enrol(tx, Enrolment(name="h"), LOCAL).id
            self.model = record(tx).version.model_id
            rollout = Rollout(model_id=self.model, number=1)
            tx.add(rollout)
            tx.flush()
            assert rollout.id is not None
            self.rollout = rollout.id
            jobs.insert(
                tx,
                key="rollout:1:step:1",
                subject_type="rollout",
                subject_id=rollout.id,
                stage=Stage.ROLLOUT,
                not_before=4e9,
            )
        self.give(NEW)

    def give(self, artifact: str) -> int:
        with self.db.transaction() as tx:
            slot = Slot(version=1, variant="original", artifact=artifact)
            return hosts.assign(tx, self.host, self.model, [slot], self.rollout).generation

    def report(self, *slots: dict[str, Any], generation: int = 1, epoch: int = 1) -> bool:
        """Report some slots of the model; whether the rollout was woken."""
        models = [{"model": "digits", "generation": generation, "slots": slots}] if slots else []
        with self.db.transaction() as tx:
            return observations.observe(tx, self.host, Observed.model_validate({"epoch": epoch, "models": models}))

    def held(self) -> Assignment:
        with self.db.read() as tx:
            row = tx.get(Assignment, (self.host, self.model))
            assert row is not None
            return row


def slot(state: str = "live", golden: str = "passed", *, artifact: str = NEW, **interval: Any) -> dict[str, Any]:
    found = {"version": 1, "variant": "original", "artifact": artifact, "state": state, "golden": golden}
    return found | ({"interval": {"seconds": 5.0, **interval}} if interval else {})


@pytest.fixture
def fleet(database: Database) -> Fleet:
    return Fleet(database)


def test_live_is_when_every_slot_is_and_its_golden_passed(fleet: Fleet) -> None:
    """Loading, unchecked and of another artifact are not live; the first time counts."""
    for seen in (slot("loading", "unchecked"), slot("live", "unchecked"), slot(artifact=OLD), slot("live", "failed")):
        assert fleet.report(seen)
        assert fleet.held().live_at is None
    fleet.report(slot())
    first = fleet.held().live_at
    assert first is not None
    fleet.report(slot("failed", "passed"))
    fleet.report(slot())
    assert fleet.held().live_at == first


def test_an_older_generation_is_not_live(fleet: Fleet) -> None:
    """A report of what the host held before says nothing of what it should hold now."""
    fleet.report(slot(artifact=OLD), generation=1)
    assert fleet.give(OLD) == 2
    fleet.report(slot(artifact=OLD, id="1", requests=5), generation=1)
    assert (fleet.held().live_at, fleet.held().requests) == (None, 0)
    fleet.report(slot(artifact=OLD, id="2", requests=5), generation=2)
    assert fleet.held().live_at is not None
    assert fleet.held().requests == 5


def test_a_repeated_report_counts_once(fleet: Fleet) -> None:
    """A report that is sent again because its answer was lost adds nothing; ids go from 9 to 10."""
    for number in ("9", "9", "10", "10", "9"):
        fleet.report(slot(id=number, requests=7, errors=1))
    assert (fleet.held().requests, fleet.held().errors) == (14, 2)


def test_a_new_process_counts_from_its_own_first_interval(fleet: Fleet) -> None:
    """Interval ids begin anew with each epoch."""
    fleet.report(slot(id="40", requests=1))
    with fleet.db.transaction() as tx:
        hosts.enrol(tx, Enrolment(id=fleet.host, name="h"), LOCAL)
    fleet.report(slot(id="1", requests=1), epoch=2)
    assert fleet.held().requests == 2


def test_only_the_assigned_slots_are_counted(fleet: Fleet) -> None:
    """Errors of a version that drains are not the new one's."""
    fleet.report(slot("draining", artifact=OLD, id="1", requests=9, errors=9), slot(id="1", requests=3))
    assert (fleet.held().requests, fleet.held().errors) == (3, 0)


def test_other_slots_are_a_new_generation_that_counts_from_zero(fleet: Fleet) -> None:
    """The same slots again change nothing, not even the revision that hosts wait for."""
    fleet.report(slot(id="1", requests=3, errors=1))

    def revision() -> int:
        with fleet.db.read() as tx:
            return hosts.desired(tx, fleet.host).revision

    before = revision()
    assert fleet.give(NEW) == 1
    assert revision() == before
    assert fleet.give(OLD) == 2
    assert revision() == before + 1
    assert (fleet.held().requests, fleet.held().errors, fleet.held().live_at) == (0, 0, None)


def test_news_wake_the_rollout_and_nothing_else_does(fleet: Fleet) -> None:
    """A changed state, an error, a host that is back: its step is due. Mere traffic is no news."""

    def due(tx: Session) -> list[int | None]:
        return [job.id for job in jobs.unsent(tx, "control", 10, 60)]

    assert fleet.report(slot())
    with fleet.db.transaction() as tx:
        woken = due(tx)
        assert woken
        jobs.mark_sent(tx, [job for job in woken if job])
    assert not fleet.report(slot(id="1", requests=50))
    assert fleet.report(slot(id="2", requests=50, errors=1))
    assert fleet.report(slot("failed", "passed"))
    assert fleet.report()  # It holds nothing any more.
    assert not fleet.report()
    with fleet.db.transaction() as tx:
        host = tx.get_one(Host, fleet.host)
        assert host.seen_at is not None
        host.seen_at -= 60
    assert fleet.report()


def test_a_host_may_fetch_what_it_is_assigned(fleet: Fleet) -> None:
    """Artifacts of its slots, nothing else, and nothing more once it is to unload them."""
    with fleet.db.transaction() as tx:
        assert hosts.may_fetch(tx, fleet.host, NEW)
        assert not hosts.may_fetch(tx, fleet.host, OLD)
        hosts.assign(tx, fleet.host, fleet.model, [], None)
        assert not hosts.may_fetch(tx, fleet.host, NEW)
        assert hosts.desired(tx, fleet.host).models == []


def test_fleets_are_chosen_by_labels(database: Database) -> None:
    """A host belongs to a fleet when it carries all its labels; retired ones belong to none."""
    with database.transaction() as tx:
        a = hosts.enrol(tx, Enrolment(name="a", labels={"zone": "x", "gpu": "h200"}), LOCAL).id
        b = hosts.enrol(tx, Enrolment(name="b", labels={"zone": "x"}), LOCAL).id
        hosts.retire(tx, hosts.enrol(tx, Enrolment(name="c", labels={"zone": "x"}), LOCAL).id, actor="t")
    with database.read() as tx:
        assert {host.id for host in hosts.fleet(tx, {})} == {a, b}
        assert {host.id for host in hosts.fleet(tx, {"zone": "x"})} == {a, b}
        assert [host.id for host in hosts.fleet(tx, {"zone": "x", "gpu": "h200"})] == [a]
        assert hosts.count(tx) == 2
