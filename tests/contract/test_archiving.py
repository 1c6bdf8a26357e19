"""What takes versions and hosts from a fleet says what that costs, refuses an outage, and has a way back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fixtures.api import Api, put_ready, sqlite_only
from fixtures.registry import record, work
from fixtures.rolling import AUTOMATIC, MODEL, Fleet
from sqlalchemy import func, update
from sqlmodel import col, select

from weighbridge.registry import archiving, artifacts, champion, hosts, rollouts, versions
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Conflict, LeavesNothing, NotFound
from weighbridge.registry.lifecycle import JobState, Stage, Verdict
from weighbridge.registry.models import Event, Host, Job, Version


@pytest.fixture
def fleet(database: Database) -> Fleet:
    """Two hosts that serve version 1."""
    found = Fleet(database)
    found.enrol("a", "b")
    found.ready("1")
    found.through("a", "b")
    return found


def archive(fleet: Fleet, number: int, *, force: bool = False) -> archiving.Loss:
    with fleet.db.transaction() as tx:
        return archiving.archive(tx, MODEL, number, actor="ada", reason="licence", force=force)[1]


def unarchive(fleet: Fleet, number: int, *, there: bool = True) -> str:
    with fleet.db.transaction() as tx:
        return archiving.unarchive(tx, MODEL, number, lambda _: there, actor="ada", reason="").status


def look(fleet: Fleet, number: int) -> tuple[str, str]:
    with fleet.db.read() as tx:
        found = versions.get(tx, MODEL, number)
        return found.status, found.reason


def alias(fleet: Fleet, name: str) -> int | None:
    with fleet.db.read() as tx:
        return champion.number(tx, 1, name)


def told(fleet: Fleet) -> int:
    with fleet.db.read() as tx:
        return tx.execute(select(func.count()).select_from(Event)).scalar_one()


def test_the_last_good_version_is_not_archived_by_the_way(fleet: Fleet) -> None:
    """Refused with hosts, aliases and what to do; nothing is changed, nothing is told."""
    before = told(fleet)
    with pytest.raises(LeavesNothing, match="leaves hosts a, b with nothing of digits") as refused:
        archive(fleet, 1)
    assert (refused.value.model, refused.value.hosts, refused.value.aliases) == (MODEL, ["a", "b"], ["champion"])
    assert "--force" in str(refused.value)
    assert (fleet.served(), alias(fleet, "champion"), told(fleet)) == ({"a": [1], "b": [1]}, 1, before)


def test_what_was_forced_has_a_way_back(fleet: Fleet) -> None:
    """The status that it had, and since nothing took its place, its hosts and its name."""
    assert archive(fleet, 1, force=True).bare == ("a", "b")
    assert (fleet.served(), alias(fleet, "champion")) == ({"a": [], "b": []}, None)
    assert unarchive(fleet, 1) == "ready"
    assert (fleet.served(), alias(fleet, "champion")) == ({"a": [1], "b": [1]}, 1)


def test_what_something_else_replaced_does_not_come_back_by_itself(fleet: Fleet) -> None:
    """The version before takes over, and stays; the one that is back is rolled out by whoever wants it."""
    fleet.ready("2")
    fleet.through("a", "b")
    with fleet.db.transaction() as tx:
        lost = archiving.loss(tx, MODEL, "champion")
    assert lost == archiving.Loss(("a", "b"), ("champion",), (), 1)
    assert archive(fleet, 2) == lost
    assert fleet.served() == {"a": [1], "b": [1]}
    assert unarchive(fleet, 2) == "ready"
    with fleet.db.transaction() as tx:
        assert rollouts.converge_champion(tx) == []
    assert (fleet.served(), alias(fleet, "champion")) == ({"a": [1], "b": [1]}, 1)
    with fleet.db.transaction() as tx:
        rollouts.start(tx, MODEL, 2, actor="ada")
    fleet.through("a", "b")
    assert fleet.served() == {"a": [2], "b": [2]}


def test_two_that_go_at_once_do_not_count_on_each_other(fleet: Fleet) -> None:
    """Of the last two good versions one is put away; the other is the last one by then."""
    fleet.ready("2")
    fleet.through("a", "b")
    both = threading.Barrier(2)

    def go(number: int) -> str:
        both.wait()
        try:
            archive(fleet, number)
        except LeavesNothing:
            return "refused"
        return "archived"

    with ThreadPoolExecutor(2) as people:
        assert sorted(people.map(go, (1, 2))) == ["archived", "refused"]
    left = alias(fleet, "champion")
    assert left in (1, 2)
    assert fleet.served() == {"a": [left], "b": [left]}


def test_looking_changes_nothing(fleet: Fleet) -> None:
    """What would be lost is said without an event, a job or a host moved."""
    before, served = told(fleet), fleet.served()
    for _ in range(2):
        with fleet.db.transaction() as tx:
            lost = archiving.loss(tx, MODEL, 1)
        assert (lost.bare, lost.champion, lost.leaves_nothing) == (("a", "b"), None, True)
    assert (told(fleet), fleet.served(), look(fleet, 1)) == (before, served, ("ready", "fine"))


def test_a_first_rollout_under_way_counts(database: Database) -> None:
    """Its hosts would go back to nothing; those of a second one go back to the first."""
    fleet = Fleet(database)
    fleet.enrol("a", "b")
    fleet.ready("1")
    fleet.step()
    with pytest.raises(LeavesNothing) as refused:
        archive(fleet, 1)
    assert refused.value.hosts == ["a"]
    fleet.through("a", "b")
    fleet.ready("2")
    fleet.step()
    assert archive(fleet, 2) == archiving.Loss(("a",), (), (), 1)


def test_a_champion_without_hosts_is_what_those_that_join_would_miss(fleet: Fleet) -> None:
    """No host is there to lose it, and the fleet would be left with nothing all the same."""
    with fleet.db.transaction() as tx:
        for name in ("a", "b"):
            hosts.retire(tx, name, actor="ada", force=True)
    with pytest.raises(LeavesNothing, match="leaves the fleet of digits with nothing"):
        archive(fleet, 1)


def test_what_nobody_is_given_is_archived_without_a_word(fleet: Fleet) -> None:
    """Also what was never ready; it comes back as what it was, with its reason."""
    with fleet.db.transaction() as tx:
        work(tx, record(tx, "bad", model=MODEL).jobs[0].id, Verdict.REJECTED, "holds NaN")
    assert archive(fleet, 2) == archiving.Loss((), (), (), 1)
    assert look(fleet, 2) == ("archived", "licence")
    assert unarchive(fleet, 2) == "rejected"
    assert look(fleet, 2) == ("rejected", "holds NaN")
    with pytest.raises(Conflict, match="version 2 of digits is rejected, not archived"):
        unarchive(fleet, 2)


def test_what_lost_its_blobs_stays_away(fleet: Fleet) -> None:
    """The message names the blob; nothing is changed."""
    archive(fleet, 1, force=True)
    with pytest.raises(Conflict, match=f"blob {'1' * 64} of its original is not in the artifact store"):
        unarchive(fleet, 1, there=False)
    assert look(fleet, 1)[0] == "archived"


def test_what_was_being_built_goes_on(database: Database) -> None:
    """Jobs of variants that archiving ended are due again."""
    with database.transaction() as tx:
        made = record(tx, "a", recipe_text="variants: [bf16]")
        artifacts.store_artifact(tx, 1, artifact_digest="a" * 64, blobs={})
        (evaluate,) = work(tx, made.jobs[0].id)
        work(tx, evaluate)
        archiving.archive(tx, MODEL, 1, actor="ada", reason="")
        job = tx.scalars(select(Job).where(Job.stage == Stage.COMPRESS)).one()
        assert job.state == JobState.CANCELLED
        archiving.unarchive(tx, MODEL, 1, lambda _: True, actor="ada", reason="")
        tx.refresh(job)
        assert job.state == JobState.QUEUED


def test_an_abort_without_a_way_back_is_asked_for(fleet: Fleet) -> None:
    """What its hosts served before was put away meanwhile; of a first rollout nobody loses anything."""
    fleet.ready("2", AUTOMATIC.replace("bake: 0", "bake: 60"))
    fleet.step()
    archive(fleet, 1, force=True)
    going = fleet.step()
    with (
        fleet.db.transaction() as tx,
        pytest.raises(LeavesNothing, match="`weighbridge unarchive digits 1`") as refused,
    ):
        rollouts.decide(tx, going.id or 0, "abort", actor="ada")
    assert refused.value.hosts == ["a"]
    with fleet.db.transaction() as tx:
        assert rollouts.decide(tx, going.id or 0, "abort", actor="ada", force=True).request is not None


def test_the_last_host_that_serves_is_not_retired_by_the_way(fleet: Fleet) -> None:
    """A silent one serves nothing: it keeps nobody from going, and goes itself without a question."""
    with fleet.db.transaction() as tx:
        tx.execute(update(Host).where(col(Host.id) == "b").values(seen_at=1.0))
    with (
        fleet.db.transaction() as tx,
        pytest.raises(LeavesNothing, match="retiring host a leaves host a with nothing"),
    ):
        hosts.retire(tx, "a", actor="ada")
    with fleet.db.transaction() as tx:
        assert hosts.retire(tx, "b", actor="ada").state == "retired"
        assert hosts.retire(tx, "a", actor="ada", force=True).state == "retired"


@pytest.fixture
def serving(closed_api: Api) -> Api:
    """The registry off loopback; host `h` serves version 1 and has a token of its own."""
    put_ready(closed_api)
    fleet = Fleet(closed_api.db)
    fleet.enrol("h")
    with closed_api.db.transaction() as tx:
        rollouts.start(tx, MODEL, 1, settings={"bake": 0}, actor="ada")
    fleet.through("h")
    closed_api.token("host", host_id="h")
    return closed_api


@sqlite_only
def test_the_rule_is_the_registrys(serving: Api) -> None:
    """409 with the details for everybody who calls; the client raises it with them, and can force it."""
    client = serving.client(serving.token("admin"))
    answer = serving.http(serving.token("approver")).post("/v1/models/digits/versions/1/archive", json={})
    assert (answer.status_code, answer.json()["code"]) == (409, "leaves-nothing")
    assert answer.json()["data"] == {"model": MODEL, "hosts": ["h"], "aliases": ["champion"]}
    lost = client.archive_loss(MODEL, 1)
    assert (lost.hosts, lost.bare, lost.leaves_nothing) == (["h"], ["h"], True)
    with pytest.raises(LeavesNothing) as refused:
        client.archive(MODEL, 1)
    assert refused.value.hosts == ["h"]
    with pytest.raises(LeavesNothing):
        client.retire("h")
    own = next(token for token in client.tokens() if token.role == "host")
    with pytest.raises(Conflict, match="is that of host h, which uses it"):
        client.revoke_token(own.id)
    client.revoke_token(own.id, force=True)
    assert client.archive(MODEL, 1, force=True).status == "archived"
    assert client.unarchive(MODEL, 1).status == "ready"
    with pytest.raises(NotFound):
        client.unarchive(MODEL, 9)
    with serving.db.read() as tx:
        assert tx.get_one(Version, 1).reason == "fine"
