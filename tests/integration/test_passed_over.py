"""Nothing is passed over in silence, and nothing that lands stops the others."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pytest
from fixtures.checkpoints import safetensors, sharded
from fixtures.odd_files import as_nobody, deep_folders
from fixtures.watched import Watched
from fixtures.worker import until

from weighbridge.daemon.loops import Idle
from weighbridge.registry import catalog
from weighbridge.registry.db import Database
from weighbridge.registry.models import Recipe
from weighbridge.storage import completeness
from weighbridge.storage.errors import AccessDenied, ObjectArchived, StorageUnavailable
from weighbridge.storage.events import ObjectEvent
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.protocols import ObjectInfo, Ref
from weighbridge.storage.s3 import S3Store
from weighbridge.storage.watch import FolderWatch

ONE = safetensors()
NFC, NFD = (unicodedata.normalize(form, "modèle") for form in ("NFC", "NFD"))


@pytest.fixture
def watched(sqlite: Database) -> Watched:
    """A store in memory, watched."""
    return Watched(MemoryStore(), sqlite)


@pytest.fixture
def folder(tmp_path: Path, sqlite: Database) -> Watched:
    """A folder, watched."""
    return Watched(FolderStore(tmp_path / "drops", create=True, durable=False), sqlite)


def listed(watched: Watched) -> dict[str, tuple[str, str]]:
    """{path: (state, reason)} after a listing and its looks; a second listing changes nothing."""
    watched.list()
    before = watched.settle().states()
    watched.list()
    assert watched.settle().states() == before
    return before


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("m/MODEL.SAFETENSORS", "call it MODEL.safetensors"),
        ("m/a.Safetensors", "call it a.safetensors"),
        ("m/a.safetensor", "call it a.safetensors"),
        ("m/a.sft", "call it a.safetensors"),
        ("m/Recipe.yaml", "call it recipe.yaml"),
        ("m/RECIPE.YML", "call it recipe.yml"),
        ("m/recipe.yaml.txt", "call it recipe.yaml"),
        ("m/recipe.json", "call it recipe.yaml"),
        ("m/Eval.safetensors", "call it eval.safetensors"),
        ("m/golden.safetensors", "<model>/<checkpoint>/"),
        ("m/weighbridge.json", "the checkpoint's folder"),
        ("m/model.safetensors.index.json", "a folder of their own"),
        ("recipe.yaml", "the folder of its model"),
        ("eval.safetensors", "the folder of its model"),
        ("m/model-00001-of-00002.safetensors", "put them and their index into one folder"),
        ("m/adapter_model.safetensors", "merg"),
    ],
)
def test_a_single_object_that_is_not_read_says_why(key: str, advice: str, watched: Watched) -> None:
    """A row names the object and what to do; no version comes of it, and none is hindered."""
    watched.store.put(key, ONE)
    watched.store.put("m/good.safetensors", safetensors({"v": ("U8", [1], b"1")}))
    state, reason = listed(watched)[key]
    assert state in ("refused", "waiting")
    assert key in reason
    assert advice in reason
    assert [version.path for version in watched.versions()] == ["m/good.safetensors"]
    watched.store.delete(key)
    assert set(listed(watched)) == {"m/good.safetensors"}


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["checkpoint-500/model.safetensors", "checkpoint-500/config.json"], "move it up, beside m/out/"),
        (["checkpoint-5/model.safetensors", "checkpoint-10/model.safetensors"], "one level too deep"),
        (["model.safetensors", "config.json", "checkpoint-500/model.safetensors"], "one level too deep"),
        (["global_step50/model.safetensors"], "one level too deep"),
        (["epoch=3-step=100/model.safetensors"], "one level too deep"),
        (["model_index.json", "unet/model.safetensors", "vae/model.safetensors"], "drop each part"),
        (["pipe/model_index.json", "pipe/unet/model.safetensors"], "drop each part"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
        (["pytorch_lora_weights.safetensors"], "merge_and_unload"),
        (["a/model.safetensors", "b/model.safetensors"], "nothing says that these are all"),
        (["config.json", "MODEL.SAFETENSORS"], "is MODEL.SAFETENSORS meant to be MODEL.safetensors?"),
    ],
)  # fmt: skip
def test_a_folder_of_something_else_says_what_to_do(files: list[str], advice: str, watched: Watched) -> None:
    """A trainer's output, a pipeline, an adapter: none is taken for one model's checkpoint."""
    for name in files:
        watched.store.put(f"m/out/{name}", b"{}" if name.endswith(".json") else ONE)
    assert advice in listed(watched)["m/out/"][1]
    assert watched.versions() == []


def test_a_recipe_may_end_in_yml_and_there_is_one(watched: Watched) -> None:
    """Its gates count; with two, nobody guesses."""
    watched.drop(("m/recipe.yml", b"gates: [{metric: accuracy, min: 0.9}]"), ("m/a.safetensors", ONE))
    [version] = watched.versions()
    with watched.db.read() as tx:
        assert "accuracy" in tx.get_one(Recipe, version.recipe_id).text
    watched.drop(("m/recipe.yaml", b"lane: fast"), ("m/b.safetensors", ONE))
    assert "m/recipe.yaml and m/recipe.yml are both there" in watched.states()["m/b.safetensors"][1]
    watched.store.delete("m/recipe.yml")
    watched.tell("m/recipe.yml").settle()
    assert len(watched.versions()) == 2


def test_two_spellings_of_one_name_are_one_model(folder: Watched) -> None:
    """NFC, whoever asks how; the recipe judges both folders, and one in each is one too many."""
    folder.store.put(f"{NFD}/a.safetensors", ONE)
    folder.store.put(f"{NFC}/b.safetensors", safetensors({"v": ("U8", [1], b"1")}))
    folder.store.put(f"{NFD}/recipe.yaml", b"lane: fast")
    listed(folder)
    first, second = folder.versions()
    assert first.model_id == second.model_id
    assert {first.number, second.number} == {1, 2}
    assert first.recipe_id == second.recipe_id
    with folder.db.read() as tx:
        assert catalog.get(tx, NFD).name == catalog.get(tx, NFC).name == NFC
    folder.store.put(f"{NFC}/recipe.yaml", b"lane: standard")
    folder.store.put(f"{NFC}/c.safetensors", safetensors({"u": ("U8", [1], b"1")}))
    assert "are both there" in listed(folder)[f"{NFC}/c.safetensors"][1]


def test_a_link_out_of_the_folder_has_a_row(folder: Watched, tmp_path: Path) -> None:
    """A file, a model's folder, a checkpoint's folder, a shard; a companion alone holds nothing up, and is told."""
    (tmp_path / "far/run").mkdir(parents=True)
    (tmp_path / "far/run/model.safetensors").write_bytes(ONE)
    drops = tmp_path / "drops"
    for name in ("m", "m/hf", "m/whole"):
        (drops / name).mkdir()
    (drops / "m/one.safetensors").symlink_to(tmp_path / "far/run/model.safetensors")
    (drops / "m/run").symlink_to(tmp_path / "far/run")
    (drops / "model").symlink_to(tmp_path / "far")
    (drops / "m/hf/model.safetensors").symlink_to(tmp_path / "far/run/model.safetensors")
    (drops / "m/hf/config.json").write_text("{}")
    (drops / "m/whole/model.safetensors").write_bytes(ONE)
    (drops / "m/whole/train.log").symlink_to("/var/log/none.log")
    states = listed(folder)
    for path in ("m/one.safetensors", "m/run/", "model/", "m/hf/"):
        assert states[path][0] == "refused"
        assert "leads out of" in states[path][1], path
    [version] = folder.versions()
    assert version.path == "m/whole/"
    assert "passed over: m/whole/train.log" in version.proof_reason
    for path in ("m/one.safetensors", "m/run", "model"):
        (drops / path).unlink()
    assert set(listed(folder)) == {"m/hf/", "m/whole/"}


class Listed:
    """A client that lists what AWS would: its keys are any text. (SeaweedFS keeps files, and tidies keys up.)"""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def get_paginator(self, _: str) -> Listed:
        return self

    def paginate(self, *, Prefix: str, **_: object) -> Iterator[dict[str, Any]]:
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        found = sorted((key, size) for key, size in self.sizes.items() if key.startswith(Prefix))
        yield {"Contents": [{"Key": k, "Size": n, "ETag": '"e"', "LastModified": moment} for k, n in found]}


def test_keys_that_no_folder_can_have_have_rows(sqlite: Database) -> None:
    """`digits//run`, a backslash, a leading slash, a line break: one row each, however much is below; what consoles put
    for a folder is nothing, and so is what has another owner."""
    client = Listed()
    odd = ("digits//run/model.safetensors", "digits//run/config.json", "/digits/a.safetensors", "digits/run/./x",
           "digits/back\\slash.safetensors", "digits/nul\0.safetensors", "digits/notes\\x.txt", ".git//x")  # fmt: skip
    client.sizes = dict.fromkeys(odd, 100) | {"digits/run/": 0, "digits//": 0}
    watched = Watched(S3Store("bucket", client=client), sqlite)  # type: ignore[arg-type]
    states = listed(watched)
    assert set(states) == {
        *("digits//run/", "/digits/", "digits/run/./"),
        *("digits/back\\slash.safetensors", "digits/nul\\x00.safetensors"),
    }
    assert {state for state, _ in states.values()} == {"refused"}
    assert "empty part" in states["digits//run/"][1]
    client.sizes = {}
    assert listed(watched) == {}


def test_what_a_user_may_not_read_waits_with_its_reason(open_folder: Path) -> None:
    """A folder, a file, a recipe: each is its own reason; the others are recorded; readable again, they are too."""
    runs = [f"{name}/run.safetensors" for name in ("alice", "bob", "zoe")]
    for name in ("lost+found/x", "bob/recipe.yaml", *runs):
        (open_folder / name).parent.mkdir(exist_ok=True)
        (open_folder / name).write_bytes(b"lane: fast" if name.endswith("yaml") else ONE)
    closed = [open_folder / name for name in ("lost+found", "alice/run.safetensors", "bob/recipe.yaml")]
    for path in closed:
        path.chmod(0)
        os.chown(path, os.geteuid(), os.getegid())

    def look() -> Any:
        db = Database("sqlite://")
        db.upgrade()
        watched = Watched(FolderStore(open_folder), db)
        watched.list()
        watched.settle(120)  # nobody owns these files: without leases a writer cannot be seen, and quiet must do
        watched.listing.once(Idle())
        return watched.settle(120).states()

    old = 1e9
    for name in ("alice", "bob", "zoe"):
        os.utime(open_folder / name / "run.safetensors", (old, old))
    states = as_nobody(look)
    assert states["zoe/run.safetensors"] == ["complete", ""]
    for path, reason in (("lost+found/", "Permission denied"), ("alice/run.safetensors", "Permission denied"),
                         ("bob/run.safetensors", "bob/recipe.yaml: Permission denied")):  # fmt: skip
        assert states[path][0] == "waiting"
        assert reason in states[path][1]
    for path in closed:
        path.chmod(0o755)
    assert set(as_nobody(look)) == set(runs)


class Picky(MemoryStore):
    """A store that answers for some keys with an error, as S3 does for what is archived or denied."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, Exception] = {}
        self.away = False

    def check(self) -> None:
        if self.away:
            raise StorageUnavailable("no route")

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        self._refuse(key)
        return super().open(key, start=start, end=end, if_match=if_match)

    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        self._refuse(key)
        return super().get(key, start=start, end=end, if_match=if_match)

    def _refuse(self, key: str) -> None:
        self.check()
        if key in self.errors:
            raise self.errors[key]


@pytest.mark.parametrize(
    "error", [AccessDenied("no"), ObjectArchived("restore it"), StorageUnavailable("503 for this one")]
)
def test_only_the_store_itself_says_that_it_is_away(sqlite: Database, error: Exception) -> None:
    """A key's error is that key's reason and costs its own pauses. When `check` fails too, nothing is decided."""
    store = Picky()
    watched = Watched(store, sqlite)
    store.errors = {f"m/{number}.safetensors": error for number in range(40)}
    watched.drop(*((key, ONE) for key in store.errors), ("zoe/good.safetensors", ONE))
    assert [version.path for version in watched.versions()] == ["zoe/good.safetensors"]
    for key in store.errors:
        assert str(error) in watched.states()[key][1]
    assert watched.list() <= 40, "nothing changed: they are asked again, and not found anew"
    store.away = True
    watched.tell("zoe/good.safetensors", "m/0.safetensors")
    with pytest.raises(StorageUnavailable, match="no route"):
        watched.intake.once(Idle())
    store.away, store.errors = False, {}
    watched.settle(60)
    assert {state for state, _ in watched.states().values()} == {"complete"}


def test_new_content_that_cannot_be_read_is_not_taken_for_the_old(sqlite: Database) -> None:
    """A version's path with a key that is refused waits, with the reason; once it can be read it is a new version."""
    store = Picky()
    watched = Watched(store, sqlite)
    watched.drop(("m/a.safetensors", ONE))
    store.errors = {"m/a.safetensors": AccessDenied("denied")}
    watched.drop(("m/a.safetensors", safetensors({"w": ("U8", [3], b"123")})))
    assert watched.states()["m/a.safetensors"][0] == "waiting"
    store.errors = {}
    watched.settle(120)
    assert len(watched.versions()) == 2


def test_a_folder_of_too_many_objects_is_refused(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look never holds more, and the row says how many a checkpoint may have."""
    monkeypatch.setattr(completeness, "MAX_OBJECTS", 10)
    for number in range(30):
        watched.store.put(f"m/run/{number}.json", b"{}")
    state, reason = listed(watched)["m/run/"]
    assert state == "refused"
    assert "more than 10 objects" in reason


def test_deep_folders_and_long_names_have_rows(folder: Watched, tmp_path: Path) -> None:
    """Beside good ones, which are recorded."""
    drops = tmp_path / "drops"
    long = drops / ("x" * 250) / ("y" * 250) / ("z" * 250) / ("a" * 250) / ("b" * 250)
    long.mkdir(parents=True)
    (long / "model.safetensors").write_bytes(ONE)
    folder.store.put("m/a.safetensors", ONE)
    (drops / "n").mkdir()
    with deep_folders(drops / "n/run"):
        states = listed(folder)
    assert [version.path for version in folder.versions()] == ["m/a.safetensors"]
    [deep] = [reason for path, (_, reason) in states.items() if path.startswith("n/")]
    assert "folders: move it up" in deep
    [name] = [reason for path, (_, reason) in states.items() if path.startswith("x")]
    assert "longer than" in name


def test_an_upload_of_hostile_recipes_costs_each_model_its_own(watched: Watched) -> None:
    """Parsed once and quickly, however often their checkpoints are looked at."""
    for number, text in enumerate(
        (b"gates: [" + b"{metric: x}," * 5000 + b"]", b"[" * 60_000, b"a: " + b"9" * 60_000, b"!!bool maybe",
         b"a: 2026-13-45", b"x" * 300_000, b"&a [*a]", b"? " * 30_000, b"\xff",
         b"".join(b"a%d: 1\n" % n for n in range(6000)))
    ):  # fmt: skip
        watched.store.put(f"h{number}/recipe.yaml", text)
        watched.store.put(f"h{number}/a.safetensors", ONE)
    watched.store.put("good/a.safetensors", ONE)
    states = listed(watched)
    assert [version.path for version in watched.versions()] == ["good/a.safetensors"]
    for number in range(10):
        state, reason = states[f"h{number}/a.safetensors"]
        assert state == "waiting"
        assert f"h{number}/recipe.yaml" in reason
        assert len(reason) < 2000


def test_junk_in_every_shape_costs_a_good_drop_a_few_looks(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand one-byte files, a hundred models of junk, bombs: a good drop is recorded after at most 30 looks."""
    for number in range(2000):
        watched.store.put(f"junk/{number}.safetensors", b"x")
    for number in range(100):
        watched.store.put(f"other{number}/a.safetensors", b"x")
    index = json.dumps({"weight_map": {f"t{n}": "a.safetensors" for n in range(20_000)}}).encode()
    for number in range(6):
        watched.store.put(f"bomb/run{number}/model.safetensors.index.json", index)
    watched.list()
    for _ in range(50):
        watched.intake.once(Idle())
    for model in ("good", "junk", "other7"):
        watched.store.put(f"{model}/good.safetensors", ONE)
        watched.tell(f"{model}/good.safetensors")
        for _ in range(30):
            watched.intake.once(Idle())
            watched.now += 0.03
        assert f"{model}/good.safetensors" in [version.path for version in watched.versions()], model


def test_a_good_one_among_new_junk_is_found_by_a_listing(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more differences than one listing tells, those written last are told."""
    monkeypatch.setattr("weighbridge.daemon.listing._AT_ONCE", 50)
    for number in range(500):
        watched.store.put(f"junk{number % 7}/{number:04}.safetensors", b"x")
    watched.store.put("middle/good.safetensors", ONE)
    for number in range(500):
        watched.store._objects[f"zzz/{number:04}.safetensors"] = _dated("zzz/{number:04}.safetensors", watched.store)
    assert watched.list() <= 100
    watched.settle()
    assert [version.path for version in watched.versions()] == ["middle/good.safetensors"]


def _dated(key: str, store: Any) -> tuple[ObjectInfo, bytes]:
    """An old object of one byte."""
    info = store.put("tmp", b"x")
    store.delete("tmp")
    return ObjectInfo(key, 1, info.etag, info.modified.replace(year=2001)), b"x"


def test_what_waits_is_asked_again_in_turns(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some at each listing, each in its turn: what they wait for may show in no listing. Nothing unchanged is found
    anew."""
    monkeypatch.setattr("weighbridge.daemon.listing._AGAIN", 10)
    for number in range(25):
        watched.store.put(f"m/{number:02}.safetensors", b"x")
    watched.list()
    watched.settle()
    again = Watched(watched.store, watched.db)  # after a restart
    told: list[list[str]] = []
    for _ in range(3):
        found: list[str] = []
        again.listing._hint = lambda group, *_, found=found: found.append(group.path)
        assert again.list() == len(found)
        told.append(found)
    assert sorted(path for found in told for path in found) == sorted(again.states())
    assert all(len(found) <= 10 for found in told)


def test_shards_of_a_real_checkpoint_are_still_whole(watched: Watched) -> None:
    """An index of any total, companions, a folder within: nothing of this is junk."""
    files = sharded() | {"runs/events.out": b"x"}
    for name, data in files.items():
        watched.store.put(f"m/run/{name}", data)
    listed(watched)
    assert len(watched.versions()) == 1


def test_a_copied_output_folders_link_is_no_version_of_its_own(folder: Watched, tmp_path: Path) -> None:
    """`latest -> checkpoint-2`, copied under a real watch: by events and by listings a link is resolved by one rule."""
    out = tmp_path / "out"
    for number in (1, 2):
        (out / f"checkpoint-{number}").mkdir(parents=True)
        data = safetensors({"w": ("U8", [1], bytes([number]))})
        (out / f"checkpoint-{number}/model.safetensors").write_bytes(data)
    (out / "latest").symlink_to("checkpoint-2")
    (out / "best.safetensors").symlink_to("checkpoint-1/model.safetensors")
    told: list[ObjectEvent] = []
    with FolderWatch(tmp_path / "drops", told.append):
        for number in range(4):
            shutil.copytree(out, tmp_path / f"drops/net{number}", symlinks=True)
        copied = {f"net{number}/" for number in range(4)}
        until("the copies are heard of", lambda: copied <= {event.key for event in told})
        folder.store.put("last/a.safetensors", ONE)
        until("and what came after them", lambda: any(event.key.startswith("last/") for event in told))
    for event in told:
        folder.intake.tell(event)
    for prefix in folder.requested:
        folder.listing.run(prefix, Idle())
    folder.settle()
    listed(folder)
    assert not [path for path in folder.states() if "latest" in path]
    paths = sorted(version.path for version in folder.versions() if version.path.startswith("net0/"))
    assert paths == ["net0/best.safetensors", "net0/checkpoint-1/", "net0/checkpoint-2/"]


def test_a_listing_that_is_asked_for_comes_when_the_last_is_as_long_ago_as_it_took(watched: Watched) -> None:
    """At once where listings are short; who asks all the time has the store listed half of the time."""
    times: list[float] = []
    took = 0.0

    def run(*_: object) -> int:
        times.append(watched.now)
        watched.now += took
        return 0

    watched.listing.run = run  # type: ignore[method-assign]
    assert watched.listing.once(Idle()) == 60
    watched.listing.request("")
    assert watched.listing.once(Idle()) == 60
    watched.now += 60
    took = 20.0
    assert watched.listing.once(Idle()) == 60
    watched.listing.request("")
    assert watched.listing.once(Idle()) == 20
    watched.now += 20
    watched.listing.once(Idle())
    assert times == [1000, 1000, 1060, 1100]
