"""Every kind of host gets the variant that was measured to be best for it, on SQLite and on PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from fixtures.api import Api, sqlite_only
from fixtures.rolling import AUTOMATIC, MODEL, Fleet
from sqlmodel import col, select

from weighbridge.registry import archiving, catalog, champion, rollouts
from weighbridge.registry.api import views
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Conflict, NotFound
from weighbridge.registry.lifecycle import RolloutStatus
from weighbridge.registry.models import Event, Rollout

R = RolloutStatus
AMX, NEON = "amx", "neon"


@pytest.fixture
def fleet(database: Database) -> Fleet:
    return Fleet(database)


def improve(fleet: Fleet) -> Rollout | None:
    with fleet.db.transaction() as tx:
        return rollouts.improve(tx, catalog.get(tx, MODEL).id or 0)


def converge(fleet: Fleet) -> list[str]:
    with fleet.db.transaction() as tx:
        return rollouts.converge_champion(tx)


def mixed(fleet: Fleet, recipe: str = AUTOMATIC) -> Fleet:
    """Three hosts of two kinds on the original of version 1, then measured: each kind has its own best variant."""
    fleet.enrol("a1", "a2", kind=AMX)
    fleet.enrol("n1", kind=NEON)
    fleet.ready("1", recipe)
    fleet.through("a1", "a2", "n1")
    assert set(fleet.holds().values()) == {"1 original"}
    fleet.measured(1, "original", {AMX: 0.010, NEON: 0.010})
    fleet.measured(1, "int8", {AMX: 0.004, NEON: 0.012})
    fleet.measured(1, "int4", {AMX: 0.008, NEON: 0.005})
    return fleet


BETTER = {"a1": "1 int8", "a2": "1 int8", "n1": "1 int4"}


def improved(fleet: Fleet, recipe: str = AUTOMATIC) -> Fleet:
    """The same hosts, each on its best."""
    mixed(fleet, recipe)
    assert improve(fleet) is not None
    assert fleet.through("a1", "a2", "n1").status == R.FINISHED
    assert fleet.holds() == BETTER
    return fleet


def test_a_fleet_of_two_kinds_moves_to_two_variants_in_waves(fleet: Fleet) -> None:
    """It is a rollout of the version over itself, says which kind goes where and why, and moves no alias."""
    mixed(fleet)
    rollout = improve(fleet)
    assert rollout is not None
    assert (rollout.number, rollout.from_number, rollout.actor) == (1, 1, "weighbridge")
    assert improve(fleet) is None, "one at a time"
    fleet.step()
    assert fleet.holds() == {"a1": "1 int8", "a2": "1 original", "n1": "1 original"}
    assert fleet.through("a1", "a2", "n1").status == R.FINISHED
    assert fleet.holds() == BETTER
    with fleet.db.read() as tx:
        shown = views.rollout_detail(tx, rollouts.find(tx, 2))
        started = tx.scalars(select(Event).where(Event.subject == "rollout:2", Event.kind == "rollout.started")).one()
        moved = tx.scalars(select(Event.kind).where(col(Event.kind).startswith("alias."))).all()
    assert shown.variants == {"": "original", AMX: "int8", NEON: "int4"}
    assert set(shown.from_variants.values()) == {"original"}
    assert started.reason.startswith("the amx: original → int8 (p99 4.00 ms, 2.5 × faster than the original's 10.00 ms")
    assert "the neon: original → int4" in started.reason
    assert moved == ["alias.moved"], "by the first rollout"
    assert improve(fleet) is None, "it has the best"


@sqlite_only
def test_a_new_version_gives_each_kind_its_variant_at_once(fleet: Fleet) -> None:
    """Where the variants are measured before the rollout starts, no second one follows."""
    improved(fleet)
    fleet.ready("2", None)
    fleet.measured(2, "original", {AMX: 0.010, NEON: 0.010})
    fleet.measured(2, "int8", {AMX: 0.004, NEON: 0.004})
    with fleet.db.transaction() as tx:
        rollouts.start(tx, MODEL, 2, settings={"bake": 0}, actor="ada")
    assert fleet.through("a1", "a2", "n1").status == R.FINISHED
    assert set(fleet.holds().values()) == {"2 int8"}
    assert improve(fleet) is None


@sqlite_only
def test_a_roll_back_returns_each_kind_to_what_it_had(fleet: Fleet) -> None:
    """Of the version before, int8 on one kind and int4 on the other."""
    improved(fleet)
    fleet.ready("2")
    fleet.step()
    fleet.report("a1")
    fleet.step()
    assert set(fleet.holds().values()) == {"2 original"}
    fleet.report("n1", "failed", reason="no kernel")
    assert fleet.step().status == R.ROLLING_BACK
    assert fleet.holds() == BETTER
    assert fleet.through("a1", "a2", "n1").status == R.ROLLED_BACK


@sqlite_only
def test_what_went_back_is_not_tried_again(fleet: Fleet) -> None:
    """A variant that a kind of host could not keep does not come back by itself, whatever joins the fleet."""
    mixed(fleet)
    assert improve(fleet) is not None
    fleet.step()
    fleet.report("a1", "live", "failed", reason="off by 0.3")
    assert fleet.through("a1", "a2", "n1").status == R.ROLLED_BACK
    assert set(fleet.holds().values()) == {"1 original"}
    assert improve(fleet) is None
    fleet.enrol("s1", kind="sve")
    assert converge(fleet) == ["s1"]
    fleet.measured(1, "original", {"sve": 0.010})
    fleet.measured(1, "bf16", {"sve": 0.002, AMX: 0.003})
    again = improve(fleet)
    assert again is not None
    assert {kind: entry["variant"] for kind, entry in again.variants.items()} == {
        "": "original", "sve": "bf16", AMX: "bf16", NEON: "original",
    }  # fmt: skip
    assert again.variants[NEON]["reason"] == "int4 went back before"
    assert fleet.through("a1", "a2", "n1", "s1").status == R.FINISHED
    assert fleet.holds() == {"a1": "1 bf16", "a2": "1 bf16", "n1": "1 original", "s1": "1 bf16"}


def test_hosts_that_join_get_the_variant_of_their_kind(fleet: Fleet) -> None:
    """A kind that nobody measured gets the original, and no rollout starts for it."""
    improved(fleet)
    fleet.enrol("a3", kind=AMX)
    fleet.enrol("odd", kind="risc")
    fleet.enrol("silent")
    assert sorted(converge(fleet)) == ["a3", "odd", "silent"]
    assert fleet.holds() == {**BETTER, "a3": "1 int8", "odd": "1 original", "silent": "1 original"}
    assert improve(fleet) is None
    assert converge(fleet) == []


@sqlite_only
def test_only_the_hosts_that_change_are_given_something(fleet: Fleet) -> None:
    """The canary is one of them; the others serve on as if nothing happened."""
    improved(fleet)
    fleet.measured(1, "bf16", {NEON: 0.002})
    rollout = improve(fleet)
    assert rollout is not None
    assert fleet.through("n1").status == R.FINISHED
    with fleet.db.read() as tx:
        row = rollouts.find(tx, rollout.id or 0)
        assert row.state["given"] == ["n1"]
    assert fleet.holds() == {**BETTER, "n1": "1 bf16"}


@sqlite_only
def test_a_variant_that_is_withdrawn_leaves_its_hosts_on_the_original(fleet: Fleet) -> None:
    """At once, without waves; the other kind keeps its own."""
    improved(fleet)
    fleet.withdraw_variant(1, "int8", "accuracy 0.71 < 0.90")
    assert sorted(converge(fleet)) == ["a1", "a2"]
    assert fleet.holds() == {"a1": "1 original", "a2": "1 original", "n1": "1 int4"}


def test_a_variant_that_is_withdrawn_under_way_takes_the_rollout_back(fleet: Fleet) -> None:
    """The reason is the variant's; before anything was given, the original takes its place instead."""
    mixed(fleet)
    improve(fleet)
    fleet.step()
    fleet.withdraw_variant(1, "int8", "accuracy 0.71 < 0.90")
    fleet.wake()
    rollout = fleet.step()
    assert (rollout.status, rollout.reason) == (
        R.ROLLING_BACK, "variant int8 of version 1 is rejected: accuracy 0.71 < 0.90",
    )  # fmt: skip
    assert set(fleet.holds().values()) == {"1 original"}


@sqlite_only
def test_a_rollout_that_was_given_to_nobody_yet_goes_on_without_the_withdrawn_variant(fleet: Fleet) -> None:
    """What waits for approval is not lost with one of its variants."""
    mixed(fleet, "rollout: {automatic: true, bake: 0}")
    fleet.ready("2", "rollout: {automatic: false, approval: true, bake: 0}")
    fleet.measured(2, "original", {AMX: 0.010})
    fleet.measured(2, "int8", {AMX: 0.004})
    with fleet.db.transaction() as tx:
        rollouts.start(tx, MODEL, 2, actor="ada")
    assert fleet.step().variants[AMX]["variant"] == "int8"
    fleet.withdraw_variant(2, "int8", "off")
    with fleet.db.transaction() as tx:
        rollouts.decide(tx, 2, "approve", actor="ada")
    rollout = fleet.through("a1", "a2", "n1")
    assert rollout.status == R.FINISHED
    assert rollout.variants[AMX]["reason"] == "int8 may not be served any more"
    assert set(fleet.holds().values()) == {"2 original"}


@sqlite_only
def test_it_starts_by_itself_only_where_a_version_would(fleet: Fleet) -> None:
    """Not without a recipe or policy that says so; with approval it waits for a person."""
    fleet.enrol("a1", kind=AMX)
    fleet.ready("1", None)
    with fleet.db.transaction() as tx:
        rollouts.start(tx, MODEL, 1, settings={"bake": 0}, actor="ada")
    fleet.through("a1")
    fleet.measured(1, "original", {AMX: 0.010})
    fleet.measured(1, "int8", {AMX: 0.004})
    assert improve(fleet) is None
    with fleet.db.transaction() as tx:
        by_hand = rollouts.start(tx, MODEL, 1, settings={"bake": 0}, actor="ada")
        assert (by_hand.number, by_hand.from_number) == (1, 1)
    fleet.through("a1")
    assert fleet.holds() == {"a1": "1 int8"}
    with fleet.db.transaction() as tx, pytest.raises(Conflict, match=r"serves version 1 already \(int8, original\)"):
        rollouts.start(tx, MODEL, 1, actor="ada")


def test_a_newer_version_does_not_wait_for_the_approval_of_a_variant(fleet: Fleet) -> None:
    """What nobody approved makes way; what runs is waited for, and then only the newer version starts."""
    careful = "rollout: {automatic: true, approval: true, bake: 0}"
    fleet.enrol("a1", kind=AMX)
    fleet.ready("1", careful)
    with fleet.db.transaction() as tx:
        rollouts.decide(tx, 1, "approve", actor="ada")
    fleet.through("a1")
    fleet.measured(1, "original", {AMX: 0.010})
    fleet.measured(1, "int8", {AMX: 0.004})
    waiting = improve(fleet)
    assert waiting is not None
    assert waiting.status == R.PENDING
    fleet.ready("2", AUTOMATIC)
    assert fleet.step(2).reason == "aborted by weighbridge: version 2 is ready"
    fleet.measured(2, "original", {AMX: 0.010})
    fleet.measured(2, "int8", {AMX: 0.004})
    fleet.step()
    fleet.ready("3")
    fleet.report("a1")
    assert fleet.step(3).status == R.FINISHED
    with fleet.db.read() as tx:
        numbers = [(row.number, row.from_number) for row in rollouts.listing(tx)]
    assert numbers == [(3, 2), (2, 1), (1, 1), (1, None)], "version 3 went before the better variant of 2"


@sqlite_only
def test_a_person_chooses_one_variant_for_all(fleet: Fleet) -> None:
    """It must be ready; no measurement takes it away again; the next version is measured as ever."""
    improved(fleet)
    with fleet.db.transaction() as tx:
        with pytest.raises(NotFound):
            rollouts.start(tx, MODEL, 1, variant="fp8", actor="ada")
        rollouts.start(tx, MODEL, 1, variant="int4", actor="ada", reason="same answers everywhere")
    assert fleet.through("a1", "a2", "n1").status == R.FINISHED
    assert set(fleet.holds().values()) == {"1 int4"}
    assert improve(fleet) is None
    fleet.enrol("odd", kind="risc")
    assert converge(fleet) == ["odd"]
    assert fleet.holds()["odd"] == "1 int4"
    fleet.withdraw_variant(1, "int8", "accuracy 0.71 < 0.90")
    words = "variant int8 of version 1 is rejected: accuracy 0.71 < 0.90"
    with fleet.db.transaction() as tx, pytest.raises(Conflict, match=words):
        rollouts.start(tx, MODEL, 1, variant="int8", actor="ada")
    fleet.ready("2")
    fleet.measured(2, "original", {AMX: 0.010, NEON: 0.010})
    fleet.measured(2, "int8", {AMX: 0.004, NEON: 0.004})
    fleet.step()
    assert fleet.holds()["a1"] == "2 original", "the choice was made when the rollout started"
    fleet.through("a1", "a2", "n1", "odd")
    assert fleet.through("a1", "a2", "n1", "odd").status == R.FINISHED
    assert fleet.holds() == {"a1": "2 int8", "a2": "2 int8", "n1": "2 int8", "odd": "2 original"}


@sqlite_only
def test_each_fleet_of_a_model_is_improved_for_itself(fleet: Fleet) -> None:
    """One after the other, each with its own map; hosts that another fleet's newer rollout moved are left alone."""
    fleet.enrol("a1", kind=AMX, zone="a")
    fleet.enrol("b1", kind=AMX, zone="b")
    fleet.ready("1", "rollout: {automatic: true, bake: 0, fleet: {zone: a}}")
    fleet.through("a1", "b1")
    fleet.ready("2", "rollout: {automatic: true, bake: 0, fleet: {zone: b}}")
    fleet.through("a1", "b1")
    assert fleet.holds() == {"a1": "1 original", "b1": "2 original"}
    for number in (1, 2):
        fleet.measured(number, "original", {AMX: 0.010})
        fleet.measured(number, "int8", {AMX: 0.004})
    assert improve(fleet) is not None
    fleet.through("a1", "b1")
    fleet.through("a1", "b1")
    assert fleet.holds() == {"a1": "1 int8", "b1": "2 int8"}
    assert improve(fleet) is None
    with fleet.db.read() as tx:
        assert champion.number(tx, catalog.get(tx, MODEL).id or 0) == 2, "better variants move no alias"


@sqlite_only
def test_the_champion_before_comes_back_with_its_variants(fleet: Fleet) -> None:
    """A version that is withdrawn after its rollout leaves every kind on what it had of the one before."""
    improved(fleet)
    fleet.ready("2")
    fleet.through("a1", "a2", "n1")
    with fleet.db.transaction() as tx:
        archiving.archive(tx, MODEL, 2, actor="ada", reason="licence")
    assert fleet.holds() == BETTER
    with fleet.db.read() as tx:
        assert champion.number(tx, catalog.get(tx, MODEL).id or 0) == 1


def test_of_two_that_would_improve_a_fleet_one_does(fleet: Fleet) -> None:
    """A worker and the daemon may find the same better variant in the same moment."""
    mixed(fleet)
    together = Barrier(2)

    def race(_: int) -> Rollout | None:
        together.wait(30)
        return improve(fleet)

    with ThreadPoolExecutor(2) as pool:
        started = [rollout for rollout in pool.map(race, range(2)) if rollout is not None]
    assert len(started) == 1


@sqlite_only
def test_the_api_starts_one_variant_and_shows_who_gets_what(api: Api) -> None:
    """By name; what cannot be served is refused in words."""
    fleet = mixed(Fleet(api.db))
    wish = {"model": MODEL, "version": 1, "variant": "int8", "settings": {"bake": 0}}
    told = api.http().post("/v1/rollouts", json=wish).json()
    assert told["variants"] == {"": "int8", AMX: "int8", NEON: "int8"}
    assert set(told["from_variants"].values()) == {"original"}
    fleet.through("a1", "a2", "n1")
    fleet.withdraw_variant(1, "int4", "off")
    refused = api.http().post("/v1/rollouts", json={**wish, "variant": "int4"})
    assert refused.status_code == 409
    assert "variant int4 of version 1 is rejected: off" in refused.json()["detail"]
    assert api.http().post("/v1/rollouts", json={**wish, "variant": "fp8"}).status_code == 404


@sqlite_only
def test_a_host_that_becomes_another_kind_under_way_does_not_hold_it_up(fleet: Fleet) -> None:
    """Its engine was upgraded, say: it keeps what it was given until the end, and then follows its new kind."""
    mixed(fleet)
    improve(fleet)
    fleet.step()
    fleet.report("a1")
    fleet.enrol("a1", kind="amx, newer")
    assert fleet.through("a1", "a2", "n1").status == R.FINISHED
    assert fleet.holds() == {**BETTER, "a1": "1 original"}
