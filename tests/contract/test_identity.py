"""Which version some weights are, on SQLite and on PostgreSQL: claims, duplicates, order, and what only accompanies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from fixtures.registry import record
from fixtures.rolling import AUTOMATIC, MODEL, Fleet
from sqlmodel import col, select

from weighbridge.registry import archiving, artifacts, catalog, champion, identity, jobs, rollouts, versions
from weighbridge.registry.db import Database, Session
from weighbridge.registry.identity import Change, Known
from weighbridge.registry.lifecycle import JobState, RolloutStatus, Verdict
from weighbridge.registry.models import Event, Job, Version
from weighbridge.registry.recipe import NO_POLICY
from weighbridge.storage.protocols import Ref
from weighbridge.storage.streaming import digest_bytes

AGAIN = "rollout: {automatic: true, again: true, bake: 0}"


def file(name: str, etag: str = "one", *, written: float = 1000.0, size: int = 64) -> Ref:
    return Ref(f"digits/{name}", size, etag, None, datetime.fromtimestamp(written, UTC).isoformat())


def folder(name: str, *files: Ref, **changes: Any) -> dict[str, Any]:
    """What a look at a folder hands over."""
    files = tuple(replace(one, key=one.key.replace("digits/", f"digits/{name}/", 1)) for one in files)
    seen = digest_bytes(repr(files).encode())
    return {"path": f"digits/{name}/", "files": files, "pins_digest": seen, "seen": seen, **changes}


def drop(database: Database, name: str, digest: str, **changes: Any) -> Version:
    """Record a checkpoint of these weights and judge it; every job that follows passes."""
    with database.transaction() as tx:
        recorded = record(tx, name, **{"files": [file(f"{name}.safetensors")], **changes})
        ready(tx, recorded.jobs, digest)
        return versions.get(tx, MODEL, recorded.version.number)


def ready(tx: Session, work: list[Job], digest: str) -> None:
    for job in work:
        assert job.id is not None
        if job.subject_type != "version":
            continue
        claim = jobs.claim(tx, job.id, "worker", 30)
        assert claim is not None
        reason = None
        if claim.stage == "validate":
            reason = identity.claim(tx, versions.lock(tx, claim.subject_id), digest)
        jobs.finish(tx, claim, Verdict.DUPLICATE if reason else Verdict.PASSED, reason or "fine", {})
        ready(tx, versions.advance(tx, claim.subject_id, actor="worker", policies=()), digest)


def events(database: Database, kind: str) -> list[Event]:
    with database.read() as tx:
        return list(tx.scalars(select(Event).where(Event.kind == kind).order_by(col(Event.id))))


def latest(database: Database) -> int:
    with database.read() as tx:
        model = catalog.get(tx, MODEL)
        number = versions.get(tx, MODEL, "latest").number
        assert catalog.latest(tx, [model.id or 0]) == {model.id: number}
        return number


ONE, TWO = file("one.safetensors", "1-64-1000000000001-5"), file("two.safetensors", "2-64-1000000000002-5")
NOTES = file("README.md", "9-9-9-9", size=9)


@pytest.mark.parametrize(
    ("found", "digest", "change"),
    [
        ((ONE, TWO), None, Change.SAME),
        ((replace(ONE, etag="1-64-1000000000001-9"), TWO), None, Change.SAME),
        ((ONE,), None, Change.LESS),
        ((), None, Change.LESS),
        ((replace(ONE, etag="1-64-1000000000009-9"), TWO), None, Change.UNKNOWN),
        ((replace(ONE, etag="3-64-1000000000001-5"), TWO), None, Change.UNKNOWN),
        ((replace(ONE, etag="3-64-1000000000001-5"), TWO), "weights", Change.SAME),
        ((replace(ONE, etag="3-64-1000000000001-5"), TWO), "others", Change.NEW),
        ((replace(ONE, etag="3-65-1000000000001-5", size=65), TWO), None, Change.NEW),
        ((ONE, TWO, file("three.safetensors")), None, Change.NEW),
        ((replace(ONE, key="digits/x.safetensors"), TWO), None, Change.UNKNOWN),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, tuple) else f"{len(value)} files",
)
def test_what_a_look_means(found: tuple[Ref, ...], digest: str | None, change: Change) -> None:
    """Only what was written anew, at the same sizes, needs to be read; a new ctime, or a part that went, does not."""
    known = Known(Version(model_id=1, number=1, pins_digest="", weights="weights"), (ONE, TWO, NOTES))
    assert identity.compare(known, found, digest) is change
    assert identity.compare(None, found, digest) is Change.NEW


@pytest.mark.parametrize("status", ["discovered", "superseded", "quarantined"])
@pytest.mark.parametrize(
    ("found", "change"),
    [
        ((ONE, TWO), Change.SAME),
        ((ONE,), Change.LESS),
        ((replace(ONE, etag="1-64-1000000000009-9"), TWO), Change.SAME),
        ((replace(ONE, etag="3-64-1000000000001-5"), TWO), Change.NEW),
        ((replace(ONE, etag="1-65-1000000000009-9", size=65), TWO), Change.NEW),
        ((replace(ONE, etag="abc"), TWO), Change.NEW),
    ],
)
def test_what_a_look_means_before_anybody_read_them(status: str, found: tuple[Ref, ...], change: Change) -> None:
    """The same files are the same version, whatever they hold by now; others are another, and nobody waits for it."""
    known = Known(Version(model_id=1, number=1, pins_digest="", status=status), (ONE, TWO, NOTES))
    touched = status == "quarantined" and found[0].etag.startswith("1-64-1000000000009")
    assert identity.compare(known, found, None) is (Change.NEW if touched else change)


def test_a_date_that_somebody_set_proves_nothing() -> None:
    """Whole seconds are `tar`'s and `touch -d`'s, alike for many files; and an inode's number is used again."""
    set_by_hand = replace(ONE, etag="1-64-1000000000000-5")
    known = Known(Version(model_id=1, number=1, pins_digest="", weights="weights"), (set_by_hand,))
    assert identity.compare(known, (replace(set_by_hand, etag="1-64-1000000000000-9"),), None) is Change.UNKNOWN


def test_the_same_weights_elsewhere_are_a_duplicate(database: Database) -> None:
    """It says of which version and what to do; it is never `latest`, and nobody judges it further."""
    first = drop(database, "a", "weights")
    second = drop(database, "b", "weights", files=[file("b.safetensors", written=2000)])
    assert (first.status, first.weights, second.status, second.weights) == ("ready", "weights", "duplicate", None)
    assert second.duplicate_of == 1
    assert second.reason == (
        "the same weights as version 1, which is ready: `weighbridge rollback digits 1` serves that version again"
    )
    [told] = events(database, "version.duplicate")
    assert told.after == {"status": "duplicate", "path": "b.safetensors", "duplicate_of": "1"}
    assert latest(database) == 1


def test_weights_that_came_back_need_no_second_reading(database: Database) -> None:
    """A, B, A at one path, the last one read by the daemon already: noted at once, without a job."""
    for etag, digest in (("one", "a"), ("two", "b")):
        drop(database, "x", digest, files=[file("x.safetensors", etag)], seen=etag, pins_digest=etag)
    with database.transaction() as tx:
        again = record(tx, "x", files=[file("x.safetensors", "three")], seen="three", pins_digest="one", weights="a")
    assert (again.version.status, again.version.duplicate_of, again.jobs) == ("duplicate", 1, [])
    assert latest(database) == 2


@pytest.mark.parametrize(
    ("verb", "advice"),
    [("archive", "it stays archived"), ("reject", "`weighbridge rejudge digits 1` judges that version anew")],
)
def test_what_was_put_away_stays_away(database: Database, verb: str, advice: str) -> None:
    """Its weights, dropped again, are a duplicate that says so."""
    drop(database, "a", "weights")
    with database.transaction() as tx:
        if verb == "archive":
            archiving.archive(tx, MODEL, 1, actor="ada", reason="bad")
        else:
            version = versions.lock(tx, 1)
            version.status, version.reason = "rejected", "accuracy 0.2 < 0.9"
    again = drop(database, "b", "weights")
    assert (again.status, again.reason.endswith(advice)) == ("duplicate", True)
    with database.read() as tx:
        assert versions.get(tx, MODEL, 1).status in ("archived", "rejected")


def test_of_two_that_are_judged_at_once_one_has_the_weights(
    database: Database, open_again: Callable[[], Database]
) -> None:
    """Two workers end at the same moment: never are both ready, and the one recorded first gives the date."""
    with database.transaction() as tx:
        work = [
            record(tx, name, files=[file(f"{name}.safetensors", written=when)]).jobs
            for name, when in (("a", 1000), ("b", 2000))
        ]
    started = threading.Barrier(2)

    def judge(db: Database, mine: list[Job]) -> None:
        started.wait()
        with db.transaction() as tx:
            ready(tx, mine, "weights")

    threads = [threading.Thread(target=judge, args=one) for one in zip((database, open_again()), work, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as tx:
        found = {one.status: one for one in tx.scalars(select(Version))}
        assert set(found) == {"ready", "duplicate"}
        assert found["ready"].written_at == 1000
        assert found["duplicate"].duplicate_of == found["ready"].number


def test_versions_go_by_when_they_were_written(database: Database) -> None:
    """Found late is not newer: `latest`, and what is rolled out where nobody names a number."""
    fleet = Fleet(database)
    fleet.enrol("a")
    drop(database, "new", "1", files=[file("new.safetensors", written=2000)])
    drop(database, "old", "2", files=[file("old.safetensors", written=1000)])
    assert latest(database) == 1
    drop(database, "newer", "3", files=[file("newer.safetensors", written=3000)])
    assert latest(database) == 3


def test_older_weights_are_not_rolled_out_by_themselves(database: Database) -> None:
    """They hold and say so, as an event and on the version; a person may start them all the same."""
    fleet = Fleet(database)
    fleet.enrol("a")
    assert fleet.ready("1") == 1
    fleet.step()
    fleet.report("a")
    assert fleet.step().status == RolloutStatus.FINISHED
    old = drop_ready(fleet, "2", written=1000.0)
    assert fleet.served() == {"a": [1]}
    [told] = events(database, "version.held")
    assert "written before those of the champion, version 1" in told.reason
    assert f"`weighbridge rollouts start digits {old}`" in told.reason
    with database.transaction() as tx:
        assert versions.get(tx, MODEL, old).facts["held"] == told.reason
        assert rollouts.start(tx, MODEL, old, actor="ada").number == old


def drop_ready(fleet: Fleet, name: str, *, written: float, recipe: str = AUTOMATIC) -> int:
    """A version written then, ready now."""
    with fleet.db.transaction() as tx:
        given = record(
            tx, name, recipe_text=recipe, policy=NO_POLICY, files=[file(f"{name}.safetensors", written=written)]
        )
        artifacts.store_artifact(tx, given.version.id or 0, artifact_digest=name * 64, blobs={})
        ready(tx, given.jobs, f"weights-{name}")
        return given.version.number


@pytest.mark.parametrize(("recipe", "moves"), [(AUTOMATIC, False), (AGAIN, True)])
def test_weights_come_again_only_where_the_recipe_says_so(database: Database, recipe: str, moves: bool) -> None:
    """A, B, A: with `again` version 1 is rolled out once more; otherwise B stays."""
    fleet = Fleet(database)
    fleet.enrol("a")
    for name, written in (("1", 1000.0), ("2", 2000.0)):
        drop_ready(fleet, name, written=written, recipe=recipe)
        fleet.step()
        fleet.report("a")
        assert fleet.step().status == RolloutStatus.FINISHED
    again = drop(database, "3", "weights-1", recipe_text=recipe, files=[file("3.safetensors", written=3000.0)])
    assert again.status == "duplicate"
    rollout = fleet.step()
    assert (rollout.number, fleet.served()["a"]) == ((1, [1]) if moves else (2, [2]))
    with database.read() as tx:
        assert champion.number(tx, again.model_id) == 2


WEIGHTS, CONFIG = file("model.safetensors"), file("config.json", size=2)


@pytest.mark.parametrize("status", ["ready", "archived", "rejected", "quarantined", "needs_binding"])
def test_companions_make_nothing_and_are_noted_once(database: Database, status: str) -> None:
    """Added, changed, gone: an event each, no version, no job; a later judgement reads what is there then."""
    with database.transaction() as tx:
        recorded = record(tx, **folder("run", WEIGHTS, CONFIG))
        ready(tx, recorded.jobs, "weights")
        versions.lock(tx, 1).status = status
    for files in ((WEIGHTS, CONFIG, NOTES), (WEIGHTS, replace(CONFIG, etag="two"), NOTES), (WEIGHTS,)):
        for _ in range(2):
            with database.transaction() as tx:
                again = record(tx, **folder("run", *files))
                assert (again.created, again.jobs, again.version.status) == (False, [], status)
    told = events(database, "version.companions")
    assert len(told) == 3
    assert told[0].after["added"] == ["digits/run/README.md"]
    assert ("rejudge" in told[0].reason) == (status in ("rejected", "quarantined", "needs_binding"))
    with database.read() as tx:
        pinned = {row.key for row in versions.files(tx, 1)}
        kept = {"digits/run/model.safetensors", "digits/run/config.json"}
        assert pinned == (kept if status in ("ready", "archived") else {"digits/run/model.safetensors"})


def test_a_judgement_that_reads_what_is_no_more_begins_anew(database: Database) -> None:
    """The same weights with other pins while they are validated: the same version, with the pins of now."""
    with database.transaction() as tx:
        first = record(tx, **folder("run", WEIGHTS, CONFIG)).jobs[0]
    with database.transaction() as tx:
        assert record(tx, **folder("run", WEIGHTS, CONFIG, NOTES)).jobs == [], "what is only added disturbs nobody"
        [second] = record(tx, **folder("run", WEIGHTS, replace(CONFIG, etag="two"))).jobs
    with database.read() as tx:
        assert jobs.get(tx, first.id or 0).state == JobState.CANCELLED
        assert {row.key: row.etag for row in versions.files(tx, 1)}["digits/run/config.json"] == "two"
    with database.transaction() as tx:
        ready(tx, [second], "weights")
        assert versions.get(tx, MODEL, "latest").status == "ready"


@pytest.mark.parametrize("noticed", [False, True], ids=["the look was first", "the worker was first"])
def test_a_file_that_is_touched_before_it_was_read_is_still_that_version(database: Database, noticed: bool) -> None:
    """`shutil.copy2` sets the date after the close: the version is of what lies there, whatever it holds by now."""
    touched = replace(file("model.safetensors", "1-64-2000000000002-5", written=2000.0))
    with database.transaction() as tx:
        job = record(tx, **folder("run", replace(touched, etag="1-64-3000000000001-5"))).jobs[0]
        if noticed:
            claim = jobs.claim(tx, job.id or 0, "worker", 30)
            assert claim is not None
            jobs.finish(tx, claim, Verdict.SUPERSEDED, "changed", {})
            versions.advance(tx, 1, actor="worker", policies=())
    with database.transaction() as tx:
        again = record(tx, **folder("run", touched))
        assert (again.created, again.version.status, again.version.written_at) == (False, "discovered", 2000.0)
        ready(tx, again.jobs, "weights")
        assert versions.get(tx, MODEL, 1).status == "ready"
    with database.transaction() as tx:
        moved = record(tx, **folder("run", replace(touched, etag="9-64-2000000000002-5")), weights="weights")
        assert not moved.created


def test_superseded_weights_that_lie_there_as_before_are_judged_again(database: Database) -> None:
    """A chmod that the worker noticed first costs a second judgement, not a second version."""
    with database.transaction() as tx:
        job = record(tx, **folder("run", WEIGHTS)).jobs[0]
        claim = jobs.claim(tx, job.id or 0, "worker", 30)
        assert claim is not None
        jobs.finish(tx, claim, Verdict.SUPERSEDED, "changed", {})
        versions.advance(tx, 1, actor="worker", policies=())
    with database.transaction() as tx:
        again = record(tx, **folder("run", WEIGHTS))
        assert (again.created, again.version.status, len(again.jobs)) == (False, "discovered", 1)


def test_the_heir_of_lost_weights_is_their_duplicate(database: Database) -> None:
    """A rejected version whose path holds something else by now is judged anew where its weights still lie."""
    drop(database, "a", "weights")
    for name in ("b", "c"):
        assert drop(database, name, "weights").status == "duplicate"
    with database.transaction() as tx:
        versions.lock(tx, 1).status = "rejected"
        (job,) = versions.rejudge(tx, MODEL, 1, actor="ada", reason="")
        claim = jobs.claim(tx, job.id or 0, "worker", 30)
        assert claim is not None
        jobs.finish(tx, claim, Verdict.SUPERSEDED, "gone", {})
        ready(tx, versions.advance(tx, 1, actor="worker", policies=()), "weights")
        found = {number: versions.get(tx, MODEL, number) for number in (1, 2, 3)}
        assert {number: one.status for number, one in found.items()} == {1: "superseded", 2: "duplicate", 3: "ready"}
        assert (found[2].duplicate_of, found[3].duplicate_of, found[3].weights) == (3, None, "weights")


def test_superseded_weights_are_free_again(database: Database) -> None:
    """A version whose bytes were lost before they were judged again keeps them from nobody."""
    drop(database, "a", "weights")
    with database.transaction() as tx:
        version = versions.lock(tx, 1)
        version.status = "rejected"
        (job,) = versions.rejudge(tx, MODEL, 1, actor="ada", reason="")
        claim = jobs.claim(tx, job.id or 0, "worker", 30)
        assert claim is not None
        jobs.finish(tx, claim, Verdict.SUPERSEDED, "gone", {})
        versions.advance(tx, 1, actor="worker", policies=())
    assert drop(database, "b", "weights").status == "ready"
