"""Rollouts against the real tables, on SQLite and on PostgreSQL: hosts report, steps are taken, people decide."""

from __future__ import annotations

import pytest
from fixtures.rolling import AUTOMATIC, MODEL, Fleet
from sqlmodel import col, select

from weighbridge.registry import aliases, archiving, catalog, champion, jobs, rollouts, versions
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Conflict, Invalid, NotFound
from weighbridge.registry.lifecycle import JobState, RolloutStatus, Verdict
from weighbridge.registry.models import Event, Job, Rollout, Version
from weighbridge.registry.recipe import Policy

R = RolloutStatus


@pytest.fixture
def fleet(database: Database) -> Fleet:
    return Fleet(database)


def two(fleet: Fleet) -> Fleet:
    """Two hosts on version 1."""
    fleet.enrol("a", "b")
    fleet.ready("1")
    fleet.step()
    fleet.report("a")
    fleet.step()
    fleet.report("b")
    assert fleet.step().status == R.FINISHED
    assert fleet.served() == {"a": [1], "b": [1]}
    return fleet


def kinds(fleet: Fleet) -> list[str]:
    with fleet.db.read() as tx:
        return list(
            tx.scalars(select(Event.kind).where(col(Event.kind).startswith("rollout.")).order_by(col(Event.id)))
        )


def alias(fleet: Fleet, name: str) -> int | None:
    with fleet.db.read() as tx:
        return champion.number(tx, catalog.get(tx, MODEL).id or 0, name)


def decide(fleet: Fleet, verb: rollouts.Verb, reason: str = "") -> Rollout:
    with fleet.db.transaction() as tx:
        newest = rollouts.listing(tx, limit=1)[0]
        return rollouts.decide(tx, newest.id or 0, verb, actor="ada", reason=reason)


def test_a_ready_version_rolls_through_the_fleet(fleet: Fleet) -> None:
    """It starts by itself, one host first, then the rest; the champion moves at the end."""
    two(fleet)
    assert alias(fleet, "champion") == 1
    assert alias(fleet, "previous") is None
    assert fleet.ready("2") == 2
    assert fleet.step().status == R.RUNNING
    assert fleet.served() == {"a": [2], "b": [1]}
    fleet.report("a", "loading", "unchecked")
    fleet.step()
    assert fleet.served() == {"a": [2], "b": [1]}
    fleet.report("a")
    fleet.step()
    assert fleet.served() == {"a": [2], "b": [2]}
    fleet.report("b")
    assert fleet.step().status == R.FINISHED
    assert (alias(fleet, "champion"), alias(fleet, "previous")) == (2, 1)
    assert kinds(fleet)[-4:] == [
        "rollout.started",
        "rollout.wave_assigned",
        "rollout.wave_assigned",
        "rollout.finished",
    ]
    with fleet.db.read() as tx:
        steps = rollouts.steps(tx, 2)
    assert [step.action for step in steps] == ["assign", "assign", "finish"]
    assert steps[1].observations["hosts"]["a"]["slots"] == {"222222222222": "live, golden passed"}


def test_a_failing_host_takes_everything_back(fleet: Fleet) -> None:
    """The wave's hosts get the old version again, the reason names the host, the version is not tried again."""
    two(fleet)
    fleet.ready("2")
    fleet.step()
    fleet.report("a", "failed", "unchecked", reason="CUDA out of memory")
    assert fleet.step().status == R.ROLLING_BACK
    assert fleet.served() == {"a": [1], "b": [1]}
    fleet.report("a")
    rollout = fleet.step()
    assert rollout.status == R.ROLLED_BACK
    assert rollout.reason == "host a: version 2 did not load: CUDA out of memory"
    assert alias(fleet, "champion") == 1
    with fleet.db.transaction() as tx:
        assert rollouts.start_automatic(tx, rollout.model_id) is None


def test_errors_during_the_bake_roll_back(fleet: Fleet) -> None:
    """A report with errors wakes the rollout, and the limit decides."""
    two(fleet)
    fleet.ready("2", "rollout: {automatic: true, bake: 3600}")
    fleet.step()
    fleet.report("a")
    fleet.step()
    fleet.report("a", requests=100, errors=1)
    assert fleet.step().status == R.RUNNING
    fleet.report("a", requests=20, errors=5)
    rollout = fleet.step()
    assert rollout.status == R.ROLLING_BACK
    assert rollout.reason == "host a: 6 of 120 requests failed (5.00%; at most 1.00%)"


def test_a_first_version_that_fails_leaves_empty_slots(fleet: Fleet) -> None:
    """Where nothing served before, a roll back unloads."""
    fleet.enrol("a")
    fleet.ready("1")
    fleet.step()
    fleet.report("a", "live", "failed", reason="outputs differ by 0.3")
    fleet.step()
    assert fleet.served() == {"a": []}
    fleet.report("a")
    rollout = fleet.step()
    assert rollout.status == R.ROLLED_BACK
    assert "golden" in rollout.reason
    assert alias(fleet, "champion") is None


def test_it_holds_without_hosts_and_goes_on_when_one_joins(fleet: Fleet) -> None:
    """The missing labels are named; an enrolment wakes it."""
    fleet.enrol("other", zone="b")
    fleet.ready("1", "rollout: {automatic: true, bake: 0, fleet: {zone: a}}")
    held = fleet.step()
    assert (held.status, held.reason) == (R.HOLDING, "no host with labels zone=a")
    fleet.enrol("a", zone="a")
    with fleet.db.transaction() as tx:
        rollouts.converge_champion(tx)
    assert fleet.step().status == R.RUNNING
    fleet.report("a")
    assert fleet.step().status == R.FINISHED
    assert fleet.served() == {"a": [1]}


def test_only_the_newest_waits(fleet: Fleet) -> None:
    """Versions that become ready meanwhile wait; when the rollout ends only the newest of them starts."""
    two(fleet)
    fleet.ready("2")
    fleet.step()
    fleet.ready("3")
    fleet.ready("4", None)
    fleet.ready("5")
    with fleet.db.read() as tx:
        assert len(rollouts.listing(tx, going=True)) == 1
    fleet.report("a")
    fleet.step(2)
    fleet.report("b")
    assert fleet.step(2).status == R.FINISHED
    with fleet.db.read() as tx:
        assert [(row.number, row.from_number) for row in rollouts.listing(tx)] == [(5, 2), (2, 1), (1, None)]


@pytest.mark.parametrize("recipe", [None, "rollout: {automatic: false}"])
def test_nothing_starts_by_itself_unless_it_is_said(fleet: Fleet, recipe: str | None) -> None:
    """Without a recipe and a policy, or with one that says no, a person starts rollouts."""
    fleet.ready("1", recipe)
    with fleet.db.read() as tx:
        assert rollouts.listing(tx) == []


def test_an_unproven_version_never_starts_by_itself(fleet: Fleet) -> None:
    """A person may start it."""
    number = fleet.ready("1", unproven=True)
    with fleet.db.transaction() as tx:
        assert rollouts.listing(tx) == []
        assert rollouts.start(tx, MODEL, number, actor="ada").number == 1


def test_starting_by_hand(fleet: Fleet) -> None:
    """Overrides are checked, the policy keeps its word, one rollout at a time, only of what is ready."""
    fleet.ready("1", None)
    strict = (Policy(max_error_rate=0.02, min_bake=5),)
    with fleet.db.transaction() as tx:
        with pytest.raises(Invalid, match=r"rollout.max_error_rate: 0.5 is overruled by the policy"):
            rollouts.start(tx, MODEL, settings={"max_error_rate": 0.5}, policies=strict, actor="ada")
        with pytest.raises(Invalid, match="wave_s"):
            rollouts.start(tx, MODEL, settings={"wave_s": [1]}, actor="ada")
        with pytest.raises(NotFound):
            rollouts.start(tx, MODEL, 7, actor="ada")
        with pytest.raises(NotFound):
            rollouts.start(tx, "nobody", actor="ada")
        rollout = rollouts.start(
            tx, MODEL, settings={"bake": 9, "waves": ["50%"]}, policies=strict, actor="ada", reason="go"
        )
        assert (rollout.number, rollout.settings["bake"], rollout.settings["waves"]) == (1, 9, ["50%"])
    with fleet.db.transaction() as tx, pytest.raises(Conflict, match="rollout 1 of digits is running"):
        rollouts.start(tx, MODEL, 1, actor="ada")


def test_overlapping_fleets_wait_for_each_other(fleet: Fleet) -> None:
    """A host may carry the labels of two fleets: their rollouts never run at once; disjoint ones do."""
    fleet.ready("1", None)
    with fleet.db.transaction() as tx:
        rollouts.start(tx, MODEL, settings={"fleet": {"zone": "a"}}, actor="ada")
    for labels in ({}, {"gpu": "h200"}, {"zone": "a", "gpu": "h200"}):
        with fleet.db.transaction() as tx, pytest.raises(Conflict, match="rollout 1 of digits is running"):
            rollouts.start(tx, MODEL, settings={"fleet": labels}, actor="ada")
    with fleet.db.transaction() as tx:
        assert rollouts.start(tx, MODEL, settings={"fleet": {"zone": "b"}}, actor="ada").id == 2


def test_what_the_fleet_serves_is_not_started_again(fleet: Fleet) -> None:
    """But going back to an older version by hand is a rollout, and the newer one does not start by itself again."""
    two(fleet)
    with fleet.db.transaction() as tx, pytest.raises(Conflict, match="serves version 1 already"):
        rollouts.start(tx, MODEL, 1, actor="ada")
    fleet.ready("2")
    fleet.step()
    fleet.report("a")
    fleet.step()
    fleet.report("b")
    fleet.step()
    with fleet.db.transaction() as tx:
        rollouts.start(tx, MODEL, 1, settings={"waves": ["100%"]}, actor="ada")
    fleet.step()
    fleet.report("a")
    fleet.report("b")
    assert fleet.step().status == R.FINISHED
    assert (alias(fleet, "champion"), alias(fleet, "previous")) == (1, 2)
    with fleet.db.read() as tx:
        assert len(rollouts.listing(tx)) == 3


def test_approval_pause_resume_promote_abort(fleet: Fleet) -> None:
    """People decide, with their names; what the status does not allow is refused."""
    fleet.enrol("a", "b", "c")
    fleet.ready("1", "rollout: {automatic: true, approval: true, bake: 3600, waves: [1, 2]}")
    assert fleet.step().status == R.PENDING
    with pytest.raises(Conflict, match="pause is possible when it is holding, running"):
        decide(fleet, "pause")
    decide(fleet, "approve")
    fleet.step()
    fleet.report("a")
    assert fleet.step().wave == 1
    paused = decide(fleet, "pause", "lunch")
    assert (paused.status, paused.reason) == (R.PAUSED, "paused by ada: lunch")
    fleet.report("a", "failed")
    assert fleet.step().status == R.PAUSED
    fleet.report("a")
    decide(fleet, "resume")
    decide(fleet, "promote", "looks fine")
    rollout = fleet.step()
    assert (rollout.wave, rollout.status) == (2, R.RUNNING)
    assert fleet.served() == {"a": [1], "b": [1], "c": [1]}
    decide(fleet, "abort", "changed my mind")
    rollout = fleet.step()
    assert (rollout.status, rollout.reason) == (R.ROLLING_BACK, "aborted by ada: changed my mind")
    for host in "abc":
        fleet.report(host)
    assert fleet.step().status == R.ROLLED_BACK
    with fleet.db.read() as tx:
        actors = {step.action: step.actor for step in rollouts.steps(tx, 1)}
    verbs = ("approve", "pause", "resume", "promote", "abort", "roll_back")
    assert [actors[verb] for verb in verbs] == ["ada"] * len(verbs)


def test_an_abort_before_anything_was_assigned(fleet: Fleet) -> None:
    """Nothing to take back: aborted."""
    fleet.ready("1", "rollout: {automatic: true, approval: true}")
    fleet.step()
    decide(fleet, "abort")
    rollout = fleet.step()
    assert (rollout.status, rollout.reason) == (R.ABORTED, "aborted by ada")
    with fleet.db.read() as tx:
        assert tx.scalars(select(Job).where(Job.subject_type == "rollout", Job.state == JobState.QUEUED)).all() == []


def test_a_host_that_joins_gets_the_champion_but_not_into_a_pause(fleet: Fleet) -> None:
    """Between rollouts at once; while a person holds the fleet's rollout not at all."""
    two(fleet)
    fleet.enrol("c")
    with fleet.db.transaction() as tx:
        assert rollouts.converge_champion(tx) == ["c"]
        assert rollouts.converge_champion(tx) == []
    fleet.ready("2")
    fleet.step()
    assert fleet.served() == {"a": [2], "b": [1], "c": [1]}
    decide(fleet, "pause")
    fleet.enrol("d")
    with fleet.db.transaction() as tx:
        assert rollouts.converge_champion(tx) == []
    decide(fleet, "resume")
    with fleet.db.transaction() as tx:
        assert rollouts.converge_champion(tx) == ["d"]
    assert fleet.served() == {"a": [2], "b": [1], "c": [1], "d": [1]}


def fast(fleet: Fleet, name: str) -> tuple[Version, int]:
    """A fast-lane version, ready while its evaluation is still to come; and that job's id."""
    from fixtures.registry import record, work

    from weighbridge.registry import artifacts

    with fleet.db.transaction() as tx:
        recorded = record(tx, name, model=MODEL, recipe_text="lane: fast\n" + AUTOMATIC)
        artifacts.store_artifact(tx, recorded.version.id or 0, artifact_digest=name * 64, blobs={})
        following = work(tx, recorded.jobs[0].id)
        evaluate = next(
            job_id for job_id in following if job_id is not None and jobs.get(tx, job_id).stage == "evaluate"
        )
        return recorded.version, evaluate


def reject(fleet: Fleet, job_id: int) -> None:
    with fleet.db.transaction() as tx:
        claim = jobs.claim(tx, job_id, "test", 30)
        assert claim is not None
        jobs.finish(tx, claim, Verdict.REJECTED, "accuracy 0.71 < 0.90", {})
        versions.advance(tx, claim.subject_id, actor="test", policies=())


def test_an_evaluation_that_fails_behind_the_rollout_takes_it_back(fleet: Fleet) -> None:
    """In the fast lane the verdict may come while hosts already serve."""
    two(fleet)
    _, evaluate = fast(fleet, "2")
    fleet.step()
    fleet.report("a")
    fleet.step()
    assert fleet.served() == {"a": [2], "b": [2]}
    reject(fleet, evaluate)
    rollout = fleet.step()
    assert (rollout.status, rollout.reason) == (R.ROLLING_BACK, "version 2 is rejected: accuracy 0.71 < 0.90")
    assert fleet.served() == {"a": [1], "b": [1]}


def test_an_evaluation_that_fails_after_the_rollout_dethrones_the_champion(fleet: Fleet) -> None:
    """The previous one is the champion again, and every host goes back to it at once."""
    two(fleet)
    _, evaluate = fast(fleet, "2")
    fleet.step()
    fleet.report("a")
    fleet.step()
    fleet.report("b")
    assert fleet.step().status == R.FINISHED
    reject(fleet, evaluate)
    assert (alias(fleet, "champion"), alias(fleet, "previous")) == (1, None)
    assert fleet.served() == {"a": [1], "b": [1]}
    with fleet.db.transaction() as tx:
        assert rollouts.converge_champion(tx) == []


def test_archiving_the_only_champion_empties_the_fleet(fleet: Fleet) -> None:
    """No host is given an archived version any more; that is asked for twice (test_archiving)."""
    two(fleet)
    with fleet.db.transaction() as tx:
        archiving.archive(tx, MODEL, 1, actor="ada", reason="licence", force=True)
    assert fleet.served() == {"a": [], "b": []}
    assert alias(fleet, "champion") is None


def test_lost_hosts_are_reported_and_hold(fleet: Fleet) -> None:
    """A silent host is named once in the events, and once when it is back."""
    two(fleet)
    fleet.ready("2", "rollout: {automatic: true, bake: 0, lost_after: 0.000001}")
    rollout = fleet.step()
    assert rollout.status == R.HOLDING
    assert "host a, b (2 lost, at most 0)" in rollout.reason
    fleet.wake()
    fleet.step()
    assert kinds(fleet).count("rollout.host_lost") == 2
    assert kinds(fleet).count("rollout.held") == 1


def test_set_alias_does_not_move_the_fleet(fleet: Fleet) -> None:
    """Only rollouts move fleets; other names are the user's."""
    two(fleet)
    fleet.ready("2", None)
    with fleet.db.transaction() as tx:
        aliases.set_alias(tx, MODEL, "mine", 2, actor="ada")
        assert rollouts.converge_champion(tx) == []


COMPARED = "rollout: {automatic: true, bake: 3600, waves: [1, '100%']}"


def baking(fleet: Fleet, *names: str, recipe: str = COMPARED) -> Rollout:
    """Version 1 everywhere with some requests behind it, version 2 live on the first host."""
    fleet.enrol(*names)
    fleet.ready("1")
    fleet.through(*names)
    for name in names:
        fleet.report(name, requests=1000, input_errors=1)
    fleet.ready("2", recipe)
    rollout = fleet.step()
    fleet.report(names[0])
    fleet.wake()
    return fleet.step(rollout.id)


def test_what_fails_on_the_old_version_too_rolls_nothing_back(fleet: Fleet) -> None:
    """10% bad clients on both: the bake goes on. What the other host counted before the rollout does not matter."""
    rollout = baking(fleet, "a", "b")
    fleet.report("a", requests=300, input_errors=20, refused=10)
    fleet.report("b", requests=300, input_errors=30)
    fleet.wake()
    assert (fleet.step(rollout.id).status, fleet.step(rollout.id).reason) == ("running", "")


@pytest.mark.parametrize("kind", ["input_errors", "refused"])
def test_what_fails_on_the_new_version_alone_rolls_it_back(fleet: Fleet, kind: str) -> None:
    """The same clients, answered by the old version beside it: both counts are told."""
    rollout = baking(fleet, "a", "b")
    fleet.report("a", requests=300, **{kind: 30})
    fleet.report("b", requests=300)
    fleet.wake()
    rollout = fleet.step(rollout.id)
    assert rollout.status == "rolling_back"
    assert "host a: 30 of 300" in rollout.reason
    assert "beside it 0 of 300" in rollout.reason


def test_with_nothing_beside_it_a_difference_holds_and_a_person_decides(fleet: Fleet) -> None:
    """A single host: what it served before may have had other clients. It holds with the numbers; promote goes on."""
    fleet.enrol("a")
    fleet.ready("1")
    fleet.through("a")
    fleet.report("a", requests=1000, input_errors=1)
    fleet.ready("2")
    fleet.step()
    fleet.report("a", requests=300, input_errors=30)
    rollout = fleet.step()
    assert rollout.status == R.HOLDING
    assert "host a: 30 of 300" in rollout.reason
    assert "before it 1 of 1000" in rollout.reason
    decide(fleet, "promote", "a new client")
    assert fleet.step().status == R.FINISHED


@pytest.mark.parametrize(("kind", "status"), [("refused", R.FINISHED), ("input_errors", R.HOLDING)])
def test_a_first_version_that_fails_inside_waits_for_a_person(fleet: Fleet, kind: str, status: RolloutStatus) -> None:
    """Nothing to compare with: failures inside the program hold; what its contract refuses does not."""
    fleet.enrol("a")
    fleet.ready("1")
    fleet.step()
    fleet.report("a", requests=100, **{kind: 50})
    rollout = fleet.step()
    assert rollout.status == status
    assert ("50 of 100" in rollout.reason) == (status == R.HOLDING)
