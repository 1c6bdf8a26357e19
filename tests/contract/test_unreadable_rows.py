"""Rows that do not parse any more, as an infinity left them: they end or hold their own subject, with the reason, and
no loop, no list and no other subject."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fixtures.api import Start
from fixtures.registry import record
from fixtures.rolling import MODEL, Fleet
from sqlalchemy import text, update
from sqlmodel import col

from weighbridge.daemon.loops import Idle
from weighbridge.daemon.reconcile import Control, Reconcile
from weighbridge.registry import artifacts, rollouts, tokens, variants, versions
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Invalid
from weighbridge.registry.lifecycle import RolloutStatus, VariantStatus, VersionStatus
from weighbridge.registry.models import Assignment, Job, Recipe, Rollout, Variant, Version
from weighbridge.registry.notify import LocalNotifier
from weighbridge.registry.schemas import VariantBenchmark

NULLS = {"bake": None, "load_timeout": None, "lost_after": None, "waves": None}
BY_HAND = "rollout: {automatic: false, bake: 0}"


def store(database: Database, table: type, row: int | None, **values: Any) -> None:
    """Overwrite columns as another release, or somebody's hand, would."""
    with database.transaction() as tx:
        statement = update(table).values(**values)
        tx.execute(statement if row is None else statement.where(col(table.id) == row))  # type: ignore[attr-defined]


def turn(database: Database) -> None:
    """One turn of the daemon's loops that look after subjects."""
    Reconcile(database, LocalNotifier()).once(Idle())
    Control(database, LocalNotifier(), "daemon", seconds=0.0).once(Idle())


@pytest.fixture
def fleet(database: Database) -> Fleet:
    """Version 1 served by two hosts, version 2 on its way to them."""
    fleet = Fleet(database)
    fleet.enrol("a", "b")
    fleet.ready("1")
    fleet.through("a", "b")
    fleet.ready("2", "rollout: {automatic: true, bake: 60}")
    fleet.step()
    return fleet


def test_a_rollout_whose_settings_do_not_parse_holds_and_can_be_aborted(fleet: Fleet) -> None:
    """It says why, waits for a person, and goes back as any other: the hosts get the version before again."""
    assert fleet.served() == {"a": [2], "b": [1]}
    store(fleet.db, Rollout, 2, settings=NULLS)
    fleet.wake()
    held = fleet.step()
    assert held.status == RolloutStatus.HOLDING
    assert "the settings of rollout 2 cannot be read: waves" in held.reason
    assert "abort it" in held.reason
    with fleet.db.transaction() as tx:
        rollouts.decide(tx, 2, "abort", actor="ann")
    assert fleet.step().status == RolloutStatus.ROLLING_BACK
    assert fleet.through("a", "b").status == RolloutStatus.ROLLED_BACK
    assert fleet.served() == {"a": [1], "b": [1]}


BROKEN: list[dict[str, Any]] = [
    {"settings": []},
    {"fleet": "no JSON"},
    {"fleet": "[1]"},
    {"state": {"given": 5}},
    {"state": {"given": ["a"], "before": {"a": None, "b": [1]}}},
    {"variants": {}},
    {"variants": {"": {"variant": None}}},
    {"from_variants": {"": {}}},
]


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_a_rollout_that_cannot_even_be_looked_at_holds_and_can_be_ended(fleet: Fleet, broken: dict[str, Any]) -> None:
    """Whatever of its row is wrong: no step fails again and again, and a person's abort ends it."""
    store(fleet.db, Rollout, 2, **broken)
    for _ in range(3):
        fleet.wake()
        turn(fleet.db)
    with fleet.db.transaction() as tx:
        row = tx.get_one(Rollout, 2)
        if row.status == RolloutStatus.HOLDING:
            assert "cannot be read" in row.reason
        assert row.step < 6, "it does not fill the database with steps"
        rollouts.decide(tx, 2, "abort", actor="ann")
    for _ in range(6):
        fleet.wake()
        turn(fleet.db)
        for host in "ab":
            fleet.report(host)
    with fleet.db.read() as tx:
        row = tx.get_one(Rollout, 2)
        assert row.status in (RolloutStatus.ABORTED, RolloutStatus.ROLLED_BACK), row.reason
        assert row.finished_at is not None


def test_one_broken_rollout_does_not_stop_the_others(fleet: Fleet) -> None:
    """A joining host gets what its fleet serves though another fleet's finished rollout cannot be read."""
    with fleet.db.transaction() as tx:
        rollouts.decide(tx, 2, "abort", actor="ann")
    fleet.through("a", "b")
    with fleet.db.transaction() as tx:
        finished = tx.get_one(Rollout, 1).model_dump(exclude={"id"})
        tx.add(Rollout(**{**finished, "fleet": "{broken"}))
    fleet.enrol("c")
    turn(fleet.db)
    assert fleet.served()["c"] == [1]


def test_a_recipe_that_does_not_parse_starts_no_rollout_and_says_why(database: Database) -> None:
    """The version is judged and ready; that nobody knows how to roll it out stands at the version."""
    fleet = Fleet(database)
    fleet.enrol("a")
    with database.transaction() as tx:
        recorded = record(tx, "1", model=MODEL, recipe_text="rollout: {automatic: true}")
        effective = tx.get_one(Recipe, recorded.version.recipe_id).effective
    store(database, Recipe, None, effective={**effective, "rollout": NULLS})
    number = fleet.ready("2", "rollout: {automatic: true}")
    with database.read() as tx:
        version = versions.get(tx, MODEL, number)
        assert version.status == VersionStatus.READY
        assert f"the recipe of version {number} cannot be read: rollout.waves" in version.facts["held"]
        assert tx.query(Rollout).count() == 0


def test_a_variant_whose_wish_does_not_parse_fails_alone(database: Database) -> None:
    """With the reason; the next turn has nothing to do, and the others are built."""
    fleet = Fleet(database)
    fleet.ready("1", f"{BY_HAND}\nvariants: [bf16, fp16]")
    store(database, Variant, 2, wish={"method": "bf16", "sparsity": None})
    with database.transaction() as tx:
        tx.execute(update(Job).where(col(Job.subject_type) == "variant").values(state="failed"))
    turn(database)
    with database.read() as tx:
        rows = {row.name: row for row in variants.listing(tx, 1)}
        assert rows["bf16"].status == VariantStatus.FAILED
        assert "the wish of variant bf16 cannot be read: sparsity" in rows["bf16"].reason
        assert rows["fp16"].status == VariantStatus.FAILED
        assert "cannot be read" not in rows["fp16"].reason
        assert variants.overdue(tx) == []


def test_a_version_whose_jobs_do_not_parse_is_quarantined_alone(database: Database) -> None:
    """A state that no release knows: the loop names it at its version, and moves the other one."""
    with database.transaction() as tx:
        for name in "ab":
            record(tx, name)
    store(database, Job, 1, state="dreaming")
    store(database, Job, 2, state="failed", reason="crashed")
    turn(database)
    with database.read() as tx:
        first, second = (tx.get_one(Version, number) for number in (1, 2))
        assert (first.status, second.status) == (VersionStatus.QUARANTINED, VersionStatus.QUARANTINED)
        assert "cannot be read" in first.reason
        assert "'dreaming'" in first.reason
        assert "crashed" in second.reason


def test_a_host_whose_slots_do_not_parse_is_told_so_alone(start_api: Start) -> None:
    """409 with the reason for that one; the lists show it with the rest."""
    api = start_api(host="0.0.0.0")
    fleet = Fleet(api.db)
    mine, other = api.host("a"), api.host("b")
    fleet.ready("1")
    fleet.step()
    with api.db.transaction() as tx:
        assigned = tx.query(Assignment).filter(Assignment.host_id == mine.id).one_or_none()
        if assigned is None:
            tx.add(Assignment(host_id=mine.id, model_id=1, generation=1))
    slots = [{"version": 1, "variant": "original", "artifact": "1" * 64, "weight": None}]
    with api.db.transaction() as tx:
        tx.execute(update(Assignment).where(col(Assignment.host_id) == mine.id).values(slots=slots))
    answer = api.http(mine.token).get(f"/v1/hosts/{mine.id}/desired")
    assert (answer.status_code, answer.json()["code"]) == (409, "unreadable")
    assert api.http(other.token).get(f"/v1/hosts/{other.id}/desired").status_code == 200
    assert len(api.http(api.token("viewer")).get("/v1/hosts").json()["items"]) == 2


def test_every_list_shows_its_rows(start_api: Start) -> None:
    """Nulls, infinities, years beyond 9999 and what is no JSON of a number: no list dies of one row."""
    api = start_api(host="0.0.0.0")
    fleet = Fleet(api.db)
    fleet.enrol("a")
    fleet.ready("1", f"{BY_HAND}\nvariants: [bf16]")
    fleet.measured(1, "bf16", {"cpu": 0.1})
    token = api.token("admin", ttl=60)
    with api.db.transaction() as tx:
        rollouts.start(tx, MODEL, 1, actor="ann")
        variant = artifacts.find_variant(tx, 1, "bf16").id
        tx.execute(text("UPDATE token SET expires_at = 1e308, created_at = 4e11"))
        tx.execute(text("UPDATE host SET seen_at = -1e308"))
        tx.execute(text("UPDATE job SET progress = 1e308, finished_at = 1e300"))
        tx.execute(text("UPDATE version SET created_at = 1e300, written_at = -5"))
        infinite = "9e999" if api.db.dialect == "sqlite" else "'Infinity'"
        tx.execute(text(f"UPDATE benchmark SET p50 = {infinite}, contended = 'x'"))
        tx.execute(
            text("INSERT INTO metric (variant_id, name, value, unit, slice, dataset_digest, judgement, created_at) "
                 f"VALUES ({variant}, 'f1', {infinite}, '', '', '', 1, 0)")
        )  # fmt: skip
        rows = json.dumps([{"scenario": "offline", "p50": None}])
        tx.execute(text("UPDATE benchmark SET rows = :rows"), {"rows": rows})
        tx.execute(text("UPDATE rollout SET settings = :broken"), {"broken": json.dumps(NULLS)})
        tx.execute(text("UPDATE recipe SET effective = :broken"), {"broken": json.dumps({"rollout": NULLS})})
        tx.execute(text("UPDATE variant SET wish = :broken"), {"broken": json.dumps({"method": None})})
    client = api.client(token)
    assert next(client.tokens()).expires_at is not None
    assert next(client.tokens()).expires_at.year == 9999  # type: ignore[union-attr]
    assert [host.id for host in client.hosts()] == ["a"]
    assert [version.number for version in client.versions()] == [1]
    assert [rollout.waves for rollout in client.rollouts()] == [[]]
    assert client.rollout(1).settings["bake"] is None
    assert client.version(MODEL, 1).recipe == {"rollout": NULLS}
    assert {variant.name for variant in client.version(MODEL, 1).variants} == {"original", "bf16"}
    (seen,) = client.benchmarks(MODEL, 1)
    assert isinstance(seen, VariantBenchmark)
    assert (seen.p50, seen.rows) == (None, [])
    assert "what is stored of it cannot be read: rows.0" in seen.reason
    assert client.status().rollouts[0].id == 1
    assert client.events(0) != []


@pytest.mark.parametrize("ttl", [float("inf"), float("nan"), -1.0, 0.0, 1e308, 3.2e8 * 2])
def test_a_token_lives_for_a_time_that_there_is(database: Database, ttl: float) -> None:
    """No infinity, no year beyond 9999, nothing negative."""
    with database.transaction() as tx, pytest.raises(Invalid, match="cannot live"):
        tokens.create(tx, "viewer", "x", ttl)


@pytest.mark.parametrize("ttl", ["1e308", "-1", "1e400", "Infinity", "NaN", '"inf"', "9" * 400])
def test_a_token_that_is_asked_for_lives_for_a_time_that_there_is(start_api: Start, ttl: str) -> None:
    """The same over the API, and the list goes on working."""
    api = start_api(host="0.0.0.0")
    http = api.http(api.token("admin"))
    body = f'{{"role": "viewer", "ttl": {ttl}}}'
    assert http.post("/v1/tokens", content=body, headers={"content-type": "application/json"}).status_code in (400, 422)
    assert len(http.get("/v1/tokens").json()["items"]) == 1
