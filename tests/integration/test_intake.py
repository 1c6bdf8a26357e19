"""From objects in a store to versions in the registry."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.checkpoints import raw, safetensors, sharded
from fixtures.histories import History, weights_key
from fixtures.watched import Watched
from fixtures.worker import until

from weighbridge.daemon.loops import Idle, Loop
from weighbridge.registry.db import Database
from weighbridge.registry.recipe import Gate, Policy
from weighbridge.storage.errors import AccessDenied, StorageUnavailable
from weighbridge.storage.events import Kind
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import ObjectInfo, PassedOver, Store
from weighbridge.storage.s3 import S3Store

ONE, TWO = safetensors(), safetensors({"w": ("F32", [2], bytes(8))})


@pytest.fixture
def watched(sqlite: Database) -> Watched:
    """A store in memory, watched."""
    return Watched(MemoryStore(), sqlite)


def test_a_whole_file_is_a_version_with_a_job_and_an_event(watched: Watched) -> None:
    """One look, one transaction: version, files, first job, event; and the checkpoint is complete."""
    watched.drop(("digits/a.safetensors", ONE))
    [version] = watched.versions()
    assert (version.number, version.status, version.proof) == (1, "discovered", "P2")
    assert [job.key for job in watched.jobs()] == [f"version:{version.id}:validate:1"]
    assert len(watched.events("version.recorded")) == 1
    assert watched.states() == {"digits/a.safetensors": ("complete", "")}


def test_what_came_twice_is_one_version(watched: Watched) -> None:
    """Events doubled, late and out of order, and listings, change nothing."""
    watched.drop(("digits/a.safetensors", ONE))
    for _ in range(3):
        watched.tell("digits/a.safetensors", "digits/a.safetensors").settle()
        watched.tell("digits/a.safetensors", kind=Kind.REMOVED).settle()
        watched.list()
        watched.settle()
    assert len(watched.versions()) == 1


def test_a_short_file_waits_and_says_what_is_missing(watched: Watched) -> None:
    """It becomes a version when the rest is there, without an event: it is looked at again by itself."""
    watched.drop(("digits/a.safetensors", ONE[:-5]))
    assert watched.versions() == []
    state, reason = watched.states()["digits/a.safetensors"]
    assert state == "waiting"
    assert "digits/a.safetensors" in reason
    watched.store.put("digits/a.safetensors", ONE)
    watched.settle(30)
    assert len(watched.versions()) == 1
    assert watched.states() == {"digits/a.safetensors": ("complete", "")}


def test_a_folder_waits_for_its_shards_and_its_companions(watched: Watched) -> None:
    """Shards in any order with truncated first tries, then files that no index names: one version with all of them."""
    files = sharded()
    for name in sorted(files, reverse=True):
        watched.drop((f"digits/run/{name}", files[name][: len(files[name]) // 2]))
    assert watched.versions() == []
    for name, data in files.items():
        watched.store.put(f"digits/run/{name}", data)
        watched.tell(f"digits/run/{name}").settle(0.1)
    watched.settle()
    [version] = watched.versions()
    assert version.path == "digits/run/"
    assert version.size == sum(map(len, files.values()))


def test_an_overwrite_is_a_new_version_and_so_are_old_weights_put_again(watched: Watched) -> None:
    """A, B, A: three versions, in this order."""
    for data in (ONE, TWO, ONE):
        watched.drop(("digits/a.safetensors", data))
    assert [(version.number, version.size) for version in watched.versions()] == [
        (1, len(ONE)),
        (2, len(TWO)),
        (3, len(ONE)),
    ]


def test_a_pickle_named_safetensors_is_quarantined_at_once(watched: Watched) -> None:
    """A version with its reason and without a job; nothing is read as a pickle."""
    watched.drop(("digits/evil.safetensors", pickle.dumps({"w": [1.0] * 100})))
    [version] = watched.versions()
    assert version.status == "quarantined"
    assert "digits/evil.safetensors" in version.reason
    assert watched.jobs() == []


def test_unsupported_and_misplaced_checkpoints_are_refused_with_advice(watched: Watched) -> None:
    """Nothing is lost, nothing is silent: the reason names the object and what to do."""
    watched.drop(("digits/old.pt", b"PK"), ("lost.safetensors", ONE), ("a:b/x.safetensors", ONE))
    states = watched.states()
    assert {path: state for path, (state, _) in states.items()} == dict.fromkeys(
        ("digits/old.pt", "lost.safetensors", "a:b/x.safetensors"), "refused"
    )
    assert "publish safetensors" in states["digits/old.pt"][1]
    assert "<model>/<checkpoint>" in states["lost.safetensors"][1]
    assert "':'" in states["a:b/x.safetensors"][1]
    assert watched.versions() == []


def test_what_is_removed_while_it_waits_is_forgotten(watched: Watched) -> None:
    """By an event, and by a listing that no event told of; a version outlives its objects."""
    watched.drop(("digits/a.safetensors", ONE[:9]), ("digits/old.pt", b"PK"), ("digits/b.safetensors", ONE))
    watched.store.delete("digits/a.safetensors")
    watched.store.delete("digits/old.pt")
    watched.store.delete("digits/b.safetensors")
    watched.tell("digits/a.safetensors", kind=Kind.REMOVED).settle()
    assert set(watched.states()) == {"digits/old.pt", "digits/b.safetensors"}
    watched.list()
    watched.settle()
    assert watched.states() == {"digits/b.safetensors": ("complete", "")}
    assert len(watched.versions()) == 1


def test_an_invalid_recipe_keeps_checkpoints_waiting_until_it_is_valid(watched: Watched) -> None:
    """The reason names the line and the field; the corrected recipe makes versions of all that waited."""
    watched.store.put("digits/recipe.yaml", b"lane: fast\ngates:\n  - metric: accurracy\n    min: 0.9\n")
    watched.drop(("digits/a.safetensors", ONE), ("digits/b.safetensors", TWO), ("other/c.safetensors", ONE))
    assert [version.path for version in watched.versions()] == ["other/c.safetensors"]
    for path in ("digits/a.safetensors", "digits/b.safetensors"):
        state, reason = watched.states()[path]
        assert state == "waiting"
        assert "digits/recipe.yaml line 3: gates.0.metric" in reason
    # Another daemon, which never saw them, is told of the recipe.
    other = Watched(watched.store, watched.db)
    other.drop(("digits/recipe.yaml", b"gates:\n  - metric: accuracy\n    min: 0.9\n"))
    assert len(watched.versions()) == 3


def test_versions_pin_the_recipe_and_the_evaluation_set_of_their_time(watched: Watched) -> None:
    """Later revisions judge later versions."""
    watched.drop(("digits/eval.safetensors", ONE), ("digits/recipe.yaml", b"lane: fast"))
    watched.drop(("digits/a.safetensors", ONE))
    watched.drop(("digits/eval.safetensors", TWO), ("digits/recipe.yaml", b"lane: standard"))
    watched.drop(("digits/b.safetensors", ONE))
    first, second = watched.versions()
    assert first.recipe_id != second.recipe_id
    assert first.eval_pin is not None
    assert second.eval_pin is not None
    assert (first.eval_pin["size"], second.eval_pin["size"]) == (len(ONE), len(TWO))


def test_a_half_written_evaluation_set_holds_up_and_is_waited_for(watched: Watched) -> None:
    """It must not judge before it is whole."""
    watched.drop(("digits/eval.safetensors", ONE[:-1]), ("digits/a.safetensors", ONE))
    assert "digits/eval.safetensors" in watched.states()["digits/a.safetensors"][1]
    watched.drop(("digits/eval.safetensors", ONE))
    assert len(watched.versions()) == 1


def test_a_recipe_that_weakens_the_policy_changes_nothing_and_is_reported(sqlite: Database) -> None:
    """What it asked for in vain is an event, in words."""
    policy = Policy(model="digits", gates=(Gate(metric="accuracy", min=0.9),), automatic=False, min_bake=5)
    watched = Watched(MemoryStore(), sqlite, policies=[policy])
    wishes = b"gates: [{metric: accuracy, min: 0.1}]\nrollout: {automatic: true, bake: 0}\n"
    watched.drop(("digits/recipe.yaml", wishes))
    watched.drop(("digits/a.safetensors", ONE))
    [event] = watched.events("recipe.overruled")
    assert event.model == "digits"
    for wish in ("gates.accuracy.min: 0.1", "rollout.automatic", "rollout.bake"):
        assert wish in event.reason
    assert len(watched.versions()) == 1


class Moody(MemoryStore):
    """A store that is away while `mood` is an error."""

    mood: Exception | None = None

    def check(self) -> None:
        if self.mood is not None:
            raise self.mood

    def survey(self, prefix: str = "") -> Iterator[ObjectInfo | PassedOver]:
        self.check()
        return super().survey(prefix)

    def find(self, key: str) -> ObjectInfo | PassedOver | None:
        self.check()
        return super().find(key)


@pytest.mark.parametrize("error", [StorageUnavailable("no route"), AccessDenied("wrong key")])
def test_a_store_that_is_away_costs_time_and_nothing_else(sqlite: Database, error: Exception) -> None:
    """Hints are kept, listings stay due, and it goes on when the store is back."""
    store = Moody()
    watched = Watched(store, sqlite)
    store.put("digits/a.safetensors", ONE)
    store.mood = error
    watched.tell("digits/a.safetensors")
    with pytest.raises(type(error)):
        watched.intake.once(Idle())
    with pytest.raises(type(error)):
        watched.listing.once(Idle())
    store.mood = None
    assert watched.listing.once(Idle()) == 60
    watched.settle()
    assert len(watched.versions()) == 1


def test_listings_find_what_no_event_told_of_and_look_only_at_differences(watched: Watched) -> None:
    """New, changed and waiting ones are looked at; what is settled and as it was is not."""
    files = sharded()
    for number in range(20):
        watched.store.put(f"digits/{number}.safetensors", ONE)
    for name, data in files.items():
        watched.store.put(f"digits/run/{name}", data)
    assert watched.list() == 21
    watched.settle()
    assert len(watched.versions()) == 21
    assert watched.list() == 0
    watched.store.put("digits/3.safetensors", TWO)
    watched.store.put("digits/run/config.json", b"{}")
    watched.store.put("digits/run-2/model.safetensors", ONE[:-1])
    assert watched.list() >= 3
    watched.settle()
    assert len(watched.versions()) == 22, "a companion makes no version"
    assert watched.list() == 1, "what waits is looked at at each listing, once"


def test_a_listing_below_a_prefix_leaves_the_rest_alone(watched: Watched) -> None:
    """As asked for by a source that saw a folder appear."""
    watched.drop(("other/b.safetensors", ONE[:9]), ("digits/c.safetensors", ONE[:9]))
    watched.store.put("digits/a.safetensors", ONE)
    watched.tell("digits/", kind=Kind.RESCAN)
    assert watched.requested == ["digits/"]
    hinted: list[str] = []
    watched.listing._hint = lambda group, *_: hinted.append(group.path)
    watched.listing.run("digits/", Idle())
    assert set(hinted) == {"digits/a.safetensors"}


def test_a_folder_moved_in_whole_is_one_version(tmp_path: Path, sqlite: Database) -> None:
    """On disk a rename brings all files at once and closes none of them."""
    watched = Watched(FolderStore(tmp_path / "drops", create=True), sqlite)
    aside = tmp_path / "aside"
    aside.mkdir()
    for name, data in sharded().items():
        (aside / name).write_bytes(data)
    (tmp_path / "drops" / "digits").mkdir()
    aside.rename(tmp_path / "drops" / "digits" / "run")
    watched.tell("digits/run/", kind=Kind.RESCAN).settle()
    assert len(watched.versions()) == 1


def test_a_file_with_an_open_writer_waits(tmp_path: Path, sqlite: Database) -> None:
    """A preallocated file looks whole; on disk only the writer's end proves it."""
    watched = Watched(FolderStore(tmp_path, create=True), sqlite)
    (tmp_path / "digits").mkdir()
    with (tmp_path / "digits" / "a.safetensors").open("wb") as file:
        file.write(ONE)
        file.flush()
        watched.tell("digits/a.safetensors").settle()
        assert "writing" in watched.states()["digits/a.safetensors"][1]
    watched.tell("digits/a.safetensors").settle()
    assert len(watched.versions()) == 1


def test_a_folder_marked_unfinished_waits_to_be_renamed(watched: Watched) -> None:
    """The old path is forgotten, the new one becomes a version."""
    watched.drop(("digits/run.tmp/model.safetensors", ONE))
    assert watched.states()["digits/run.tmp/"][0] == "waiting"
    watched.store.delete("digits/run.tmp/model.safetensors")
    watched.store.put("digits/run/model.safetensors", ONE)
    watched.tell("digits/run.tmp/", "digits/run/", kind=Kind.RESCAN).settle()
    assert watched.states() == {"digits/run/": ("complete", "")}


def test_one_that_cannot_be_looked_at_holds_up_no_other(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of ours is logged with its traceback, and looked at again later."""
    real = watched.store.find
    watched.store.put("digits/bad.safetensors", ONE)

    def find(key: str) -> ObjectInfo | PassedOver | None:
        if "bad" in key:
            raise ZeroDivisionError("oops")
        return real(key)

    monkeypatch.setattr(watched.store, "find", find)
    watched.tell("digits/bad.safetensors").drop(
        ("digits/good.safetensors", raw({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)))
    )
    assert [version.path for version in watched.versions()] == ["digits/good.safetensors"]
    assert "digits/bad.safetensors cannot be looked at: oops" in caplog.text
    assert "fault of Weighbridge (ZeroDivisionError)" in watched.states()["digits/bad.safetensors"][1]
    monkeypatch.undo()
    watched.settle(60)
    assert len(watched.versions()) == 2


@pytest.mark.slow
def test_a_hundred_at_once_seen_by_two_daemons_are_a_hundred_versions(
    database: Database, open_again: Callable[[], Database], tmp_path: Path
) -> None:
    """On SQLite and PostgreSQL: each hears every event twice, looks in three threads, and lists besides."""
    store: Store = FolderStore(tmp_path / "drops", create=True, durable=False)
    daemons = [Watched(store, database), Watched(store, open_again())]
    names = [f"digits/{number:03}.safetensors" for number in range(100)]
    for name in names:
        store.put(name, ONE)

    def look(daemon: Watched) -> None:
        while daemon.looks.next_due() <= daemon.now:
            daemon.intake.once(Idle())

    for daemon in daemons:
        daemon.list()
        daemon.tell(*names, *names)
    threads = [threading.Thread(target=look, args=(daemon,)) for daemon in daemons for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for daemon in daemons:
        daemon.settle()
    versions = daemons[0].versions()
    assert sorted(version.path for version in versions) == names
    assert [version.number for version in versions] == list(range(1, 101))
    assert len({job.key for job in daemons[0].jobs()}) == 100
    assert {state for state, _ in daemons[0].states().values()} == {"complete"}


def test_on_s3_listings_and_hints_find_the_same(s3_store: Store, sqlite: Database) -> None:
    """A sharded upload with a truncated first try, an overwrite; then no listing sees anything new."""
    watched = Watched(s3_store, sqlite)
    files = sharded()
    first = next(iter(files))
    watched.drop((f"digits/run/{first}", files[first][:-9]), ("digits/a.safetensors", ONE))
    for name, data in files.items():
        s3_store.put(f"digits/run/{name}", data)
    s3_store.put("digits/a.safetensors", TWO)
    watched.list()
    watched.settle()
    first, *others = [version.path for version in watched.versions()]
    assert first == "digits/a.safetensors"
    # S3 dates to the second: whether these two have one date depends on when the test began.
    assert sorted(others) == ["digits/a.safetensors", "digits/run/"]
    assert watched.list() == 0


def test_what_one_listing_finds_is_numbered_as_it_was_written(tmp_path: Path, sqlite: Database) -> None:
    """By the weights' dates, and by the numbers in names where they have one date; a fresh config does not count."""
    watched = Watched(FolderStore(tmp_path, create=True, durable=False), sqlite)
    steps = [1000, 800, 1100, 900, 7, 70]
    for step in steps:
        data = safetensors({"w": ("F32", [1], bytes([step % 256] * 4))})
        watched.store.put(f"net/checkpoint-{step}/model.safetensors", data)
        moment = 1_500_000_000 if step > 100 else 1_400_000_000
        os.utime(tmp_path / f"net/checkpoint-{step}/model.safetensors", (moment, moment))
    watched.store.put("net/checkpoint-7/config.json", b"{}")
    assert watched.list() == 6
    watched.settle()
    assert [v.path for v in watched.versions()] == [f"net/checkpoint-{step}/" for step in (7, 70, 800, 900, 1000, 1100)]


class Live(Watched):
    """One whose clock is the machine's, for loops with threads."""

    def clock(self) -> float:
        return time.monotonic()


def test_threads_and_hints_in_any_order_number_them_as_they_were_written(tmp_path: Path, sqlite: Database) -> None:
    """Files and folders, hinted at in the wrong order, looked at by four threads."""
    watched = Live(FolderStore(tmp_path, create=True, durable=False), sqlite)
    written = []
    for number in range(24):
        name = f"{97 * number % 24:02}"  # not in the order of names either
        key = f"net/{name}.safetensors" if number % 3 else f"net/{name}/model.safetensors"
        watched.store.put(key, safetensors({"w": ("F32", [1], bytes([number] * 4))}))
        os.utime(tmp_path / key, (1_500_000_000 + number, 1_500_000_000 + number))
        written.append(key)
    watched.tell(*reversed(written))
    loop = Loop(watched.intake, threads=4)
    loop.start()
    try:
        until("all are recorded", lambda: len(watched.versions()) == len(written), 60)
    finally:
        loop.stop()
        assert loop.join(time.monotonic() + 30)
    assert [v.path for v in watched.versions()] == [key.removesuffix("model.safetensors") for key in written]


def test_on_every_store_what_is_done_around_weights_makes_nothing(any_store: Store, sqlite: Database) -> None:
    """A copy onto itself, the same bytes put again, companions that come, change and go, a restart."""
    told = History(any_store, sqlite)
    single, folder = "m/step-900.safetensors", "m/checkpoint-8/"
    for content, path in enumerate((folder, single)):  # in one second of a store's clock names decide
        told.write(path, content)
    told.observe()
    for path in (single, folder):
        copy_onto_itself(any_store, weights_key(path))
        told.observe()
        told.write(path, told.content(path))
        told.observe()
    for number in range(3):
        told.companion(folder, number)
        told.observe()
    told.drop_companion(folder, 0)
    told.restart()
    told.observe()
    assert told.ready() == told.served == [0, 1]
    assert len(told.watched.versions()) == 2
    for content in (0, 1):
        told.write(single, content)
        told.observe()
    assert [(v.status, v.duplicate_of) for v in told.watched.versions()[2:]] == [("duplicate", 1), ("duplicate", 2)]
    assert told.ready() == [0, 1]


def copy_onto_itself(store: Store, key: str) -> None:
    """As `aws s3 cp` does to change metadata; a file is written again."""
    if isinstance(store, S3Store):
        named: Any = {"Bucket": store.bucket, "Key": store.prefix + key}
        store.client.copy_object(**named, CopySource=named, MetadataDirective="REPLACE", Metadata={"by": "somebody"})
    else:
        store.copy(pin(store.head(key)), key)


def test_a_large_object_copied_onto_itself_is_read(s3_store: Store, sqlite: Database) -> None:
    """A copy may have another ETag than the upload in parts had: only the bytes tell, and they are the same."""
    told = History(s3_store, sqlite)
    part = 5 << 20
    data = safetensors({"w": ("U8", [part + 100], bytes(part + 100))})
    s3_store.put("m/big.safetensors", data)
    told.observe()
    before = s3_store.head("m/big.safetensors").etag
    assert isinstance(s3_store, S3Store)
    s3_store.client.put_object(Bucket=s3_store.bucket, Key=f"{s3_store.prefix}m/big.safetensors", Body=data)
    assert s3_store.head("m/big.safetensors").etag != before
    told.observe()
    assert [(v.number, v.status) for v in told.watched.versions()] == [(1, "ready")]


def test_what_is_quarantined_stays_so_whatever_is_done_around_it(watched: Watched) -> None:
    """A pickle named .safetensors, put again, is the one that is there; its bytes are all that is known of it."""
    data = pickle.dumps({"w": [1.0] * 100})
    for _ in range(3):
        watched.drop(("digits/evil.safetensors", data))
    [version] = watched.versions()
    assert version.status == "quarantined"
    assert version.facts["weights"]


def test_weights_that_are_read_hold_up_no_other_model(watched: Watched) -> None:
    """Nor for long the younger ones of their own: it is said what is read, and why."""
    told = History(watched.store, watched.db)
    told.write("m/step-900.safetensors", 0)
    told.observe()
    told.write("m/step-900.safetensors", 1)
    watched.tell("m/step-900.safetensors")
    watched.intake.once(Idle())
    assert "being read, to see whether these weights are known" in watched.states()["m/step-900.safetensors"][1]
    watched.drop(("digits/a.safetensors", ONE))
    assert [v.path for v in watched.versions()][-1] == "digits/a.safetensors"


def test_a_part_that_is_removed_leaves_the_version_as_it_is(watched: Watched) -> None:
    """A slow `rm`: companions, a shard, the index, all; nothing waits for what was deleted."""
    files = sharded()
    for name, data in files.items():
        watched.store.put(f"digits/run/{name}", data)
    watched.drop(("digits/run/config.json", b"{}"))
    for name in ["config.json", *sorted(files)]:
        watched.store.delete(f"digits/run/{name}")
        watched.tell(f"digits/run/{name}", kind=Kind.REMOVED).settle()
        watched.list()
        watched.settle()
        assert watched.states() == {"digits/run/": ("complete", "")}
    assert len(watched.versions()) == 1


def test_a_link_to_a_folder_is_no_checkpoint_however_it_is_looked_at(tmp_path: Path, sqlite: Database) -> None:
    """`latest -> checkpoint-2`: what it holds is listed where it lies, also when an event names the link."""
    watched = Watched(FolderStore(tmp_path, create=True, durable=False), sqlite)
    watched.store.put("net/checkpoint-2/model.safetensors", ONE)
    (tmp_path / "net/latest").symlink_to("checkpoint-2")
    watched.tell("net/latest/model.safetensors", "net/checkpoint-2/model.safetensors").settle()
    watched.tell("net/latest/", kind=Kind.RESCAN).settle()
    watched.list()
    watched.settle()
    assert [v.path for v in watched.versions()] == ["net/checkpoint-2/"]
    assert set(watched.states()) == {"net/checkpoint-2/"}
