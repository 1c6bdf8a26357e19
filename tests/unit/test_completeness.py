"""When a checkpoint is complete: by proof, never by patience."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from fixtures.checkpoints import safetensors, sharded
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge.storage import names
from weighbridge.storage.completeness import (
    Complete,
    Proof,
    Refused,
    Unsupported,
    Verdict,
    Waiting,
    assess,
    listed,
    look,
)
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin, pins_digest
from weighbridge.storage.protocols import Ref, Store
from weighbridge.storage.published import Published, PublishedFile
from weighbridge.storage.streaming import digest_bytes

RUN = "digits/run-1/"


def put(store: Store, files: dict[str, bytes], folder: str = RUN) -> None:
    for name, data in files.items():
        store.put(folder + name, data)


def folder_of(files: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore()
    put(store, files)
    return store


def manifest(files: dict[str, bytes]) -> bytes:
    return Published(
        files=tuple(PublishedFile(path=n, size=len(d), digest=digest_bytes(d)) for n, d in files.items())
    ).canonical()


def waits(verdict: Verdict) -> str:
    assert isinstance(verdict, Waiting), verdict
    return verdict.reason


def test_a_single_file_is_complete_when_it_is_as_long_as_its_header_says() -> None:
    """P2 for one object: its pin is the checkpoint; neighbours with a longer name do not matter."""
    store = MemoryStore()
    info = store.put("digits/a.safetensors", safetensors())
    store.put("digits/a.safetensors.md5", b"")
    verdict = look(store, "digits/a.safetensors")
    assert verdict == Complete(Proof.P2, (pin(info),), "1 safetensors file with 1 tensor, as long as the headers say")


def test_a_short_file_waits_and_counts() -> None:
    """Empty first, then short: the reason says how many bytes are there of how many."""
    data, store = safetensors({"w": ("U8", [4096], bytes(4096))}), MemoryStore()
    for have in (0, 5, 8, 1024):
        store.put("digits/a.safetensors", data[:have])
        reason = waits(look(store, "digits/a.safetensors"))
        assert f"digits/a.safetensors has {have:,} of " in reason
    assert f"1,024 of {len(data):,} bytes" in reason


def test_a_pickle_named_safetensors_is_refused_at_once() -> None:
    """Wrong by content: refused with its pin, in a folder too, without waiting for the rest."""
    store = MemoryStore()
    info = store.put("digits/evil.safetensors", pickle.dumps({"a": 1}))
    verdict = look(store, "digits/evil.safetensors")
    assert isinstance(verdict, Refused)
    assert verdict.files == (pin(info),)
    assert "digits/evil.safetensors is a Python pickle" in verdict.reason
    assert isinstance(look(folder_of({"model.safetensors": pickle.dumps(1), "config.json": b"{}"}), RUN), Refused)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a.bin", "a.onnx", "a.pt2", "pytorch_model.bin"])
def test_other_formats_are_unsupported_and_say_what_to_do(name: str) -> None:
    """Neither refused nor waiting for ever: the reason names the format and the way out."""
    store = MemoryStore()
    store.put(f"digits/{name}", b"x")
    put(store, {name: b"x", "config.json": b"{}"})
    for path in (f"digits/{name}", RUN):
        verdict = look(store, path)
        assert isinstance(verdict, Unsupported)
        assert f"format .{name.split('.')[1]} is not supported yet: publish safetensors" in verdict.reason
        assert verdict.files


def test_a_trainers_state_beside_the_weights_is_a_companion() -> None:
    """optimizer.pt and config.json come along; alone they are no checkpoint yet; dot-files are left out."""
    state = {"optimizer.pt": b"x", "training_args.bin": b"x", "config.json": b"{}", ".cache/x.lock": b""}
    assert "no .safetensors file yet" in waits(look(folder_of(state), RUN))
    verdict = look(folder_of(state | {"model.safetensors": safetensors(), "golden.safetensors": safetensors()}), RUN)
    assert isinstance(verdict, Complete)
    assert [ref.key.removeprefix(RUN) for ref in verdict.files] == [
        "config.json", "golden.safetensors", "model.safetensors", "optimizer.pt", "training_args.bin",
    ]  # fmt: skip


def test_shards_need_their_index_and_the_index_its_shards() -> None:
    """Whichever file is missing or short, the reason names it; with all of them it is complete."""
    files = sharded()
    verdict = look(folder_of(files), RUN)
    assert isinstance(verdict, Complete)
    assert {ref.key for ref in verdict.files} == {RUN + name for name in files}
    second, index = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
    without = {name: data for name, data in files.items() if name != second}
    assert waits(look(folder_of(without), RUN)) == f"{RUN}{index} names {RUN}{second}, which is not there yet"
    short = files | {second: files[second][:100]}
    assert f"{second} has 100 of " in waits(look(folder_of(short), RUN))
    headless = {name: data for name, data in files.items() if name != index}
    assert "is one of several files, and their index" in waits(look(folder_of(headless), RUN))
    only_index = {index: files[index]}
    assert "model-00001-of-00003.safetensors, which is not there yet" in waits(look(folder_of(only_index), RUN))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: index["weight_map"].pop("layer1.bias"), "'layer1.bias' is in None, the headers say"),
        (lambda index: index["weight_map"].update(more="model-00001-of-00003.safetensors"), "'more' is in"),
        (lambda index: index["weight_map"].update({"layer1.bias": "model-00002-of-00003.safetensors"}), "layer1.bias"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_its_shards_waits(
    change: Callable[[dict[str, dict[str, object]]], None], reason: str
) -> None:
    """Files that do not fit each other may be of two checkpoints, one being written over the other."""
    files = sharded()
    index = json.loads(files["model.safetensors.index.json"])
    change(index)
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert reason in waits(look(folder_of(files), RUN))


@pytest.mark.parametrize("total", [1, 0, -5, 10**30, True, "many", None, [1]])
def test_total_size_informs_and_gates_nothing(total: object) -> None:
    """Loaders ignore it, and tools write counts of tensors or sizes of files there; a number that differs is told."""
    files = sharded()
    index = json.loads(files["model.safetensors.index.json"])
    index["metadata"]["total_size"] = total
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    verdict = look(folder_of(files), RUN)
    assert isinstance(verdict, Complete)
    assert ("total_size says" in verdict.reason) == isinstance(total, int)


@pytest.mark.parametrize(
    ("text", "kind"),
    [(b"", Waiting), (b'{"weight_map": {"a": "model', Waiting), (b'{"weight_map": tru', Waiting), (b"[]", Refused),
     (b'{"weight_map": {}}', Refused), (b'{"weight_map": {"a": "../a.safetensors"}}', Refused),
     (b'{"weight_map": {"a": "a.bin"}}', Refused), (b'{"weight_map" 1, "b": {"c": "defghijk"}}', Refused),
     (b'{"weight_map": {"a": 1, "a": 1}}', Refused)],
)  # fmt: skip
def test_a_broken_off_index_waits_and_a_wrong_one_is_refused(text: bytes, kind: type[Verdict]) -> None:
    """What may be the beginning of an index waits; what cannot become one is refused."""
    verdict = look(folder_of(sharded() | {"model.safetensors.index.json": text}), RUN)
    assert isinstance(verdict, kind), verdict


def test_several_files_without_an_index_wait() -> None:
    """Two whole files prove nothing about a third."""
    files = {"a.safetensors": safetensors(), "b.safetensors": safetensors()}
    assert "2 weight files and nothing says that these are all" in waits(look(folder_of(files), RUN))


@pytest.mark.parametrize("mark", ["model.safetensors.tmp", "x.incomplete", "y.part", "shards-unfinished"])
def test_marks_of_unfinished_work_hold_it_back(mark: str) -> None:
    """A name that says unfinished counts more than structure."""
    store = folder_of({"model.safetensors": safetensors(), mark: b""})
    assert "marked unfinished" in waits(look(store, RUN))


def test_a_marker_beside_the_folder_holds_it_back() -> None:
    """NeMo's marker lies beside the checkpoint; when it goes, the checkpoint is complete."""
    store = folder_of({"model.safetensors": safetensors()})
    store.put("digits/run-1-unfinished.txt", b"")
    assert "run-1-unfinished.txt says that it is unfinished" in waits(look(store, RUN))
    store.delete("digits/run-1-unfinished.txt")
    assert isinstance(look(store, RUN), Complete)


def test_an_open_upload_holds_it_back() -> None:
    """A multipart upload of any of its keys, there or not, means that more is coming; only its own keys count."""

    class Uploading(MemoryStore):
        def uploads(self, prefix: str) -> list[str]:
            return [key for key in ("digits/run-1/more.json", "digits/b.safetensors.bak") if key.startswith(prefix)]

    store = Uploading()
    put(store, {"model.safetensors": safetensors()})
    store.put("digits/b.safetensors", safetensors())
    assert "multipart upload of digits/run-1/more.json is not finished" in waits(look(store, RUN))
    assert isinstance(look(store, "digits/b.safetensors"), Complete)


def test_a_published_checkpoint_is_proven_by_its_manifest() -> None:
    """P0: all named files at their sizes. Others are left out of the pins, even unfinished ones."""
    files = sharded()
    store = folder_of(files | {"old.tmp": b"", "weighbridge.json": manifest(files)})
    verdict = look(store, RUN)
    assert isinstance(verdict, Complete)
    assert verdict.proof is Proof.P0
    assert {ref.key for ref in verdict.files} == {RUN + name for name in (*files, "weighbridge.json")}
    assert "left out, since it does not name them: 1" in verdict.reason


def test_a_manifest_waits_for_its_files() -> None:
    """A copied folder may show the manifest first: missing, short and long files wait by name."""
    files = {"model.safetensors": safetensors(), "config.json": b"{}"}
    whole = manifest(files)
    for lacking, reason in (
        ({"model.safetensors": safetensors()}, "names config.json, which is not there yet"),
        (files | {"config.json": b"{"}, "config.json has 1 of 2 bytes by weighbridge.json"),
        (files | {"config.json": b"{ }"}, "config.json has 3 of 2 bytes by weighbridge.json"),
    ):
        assert reason in waits(look(folder_of(lacking | {"weighbridge.json": whole}), RUN))
    assert "it ends after 40 bytes" in waits(look(folder_of(files | {"weighbridge.json": whole[:40]}), RUN))
    assert isinstance(look(folder_of(files | {"weighbridge.json": b""}), RUN), Waiting)


@pytest.mark.parametrize(
    "change",
    [{"format": "other/1"}, {"files": []}, {"files": [{"path": "../x", "size": 1, "digest": "0" * 64}]},
     {"files": [{"path": "x", "size": -1, "digest": "0" * 64}]}, {"files": [{"path": "x", "size": 1, "digest": "Z"}]},
     {"files": [{"path": "weighbridge.json", "size": 1, "digest": "0" * 64}]}],
)  # fmt: skip
def test_a_wrong_manifest_is_refused(change: dict[str, object]) -> None:
    """A manifest that breaks its format names field and rule; no path of it leaves the folder."""
    files = {"model.safetensors": safetensors()}
    text = json.dumps(json.loads(manifest(files)) | change).encode()
    verdict = look(folder_of(files | {"weighbridge.json": text}), RUN)
    assert isinstance(verdict, Refused)
    assert "weighbridge.json: f" in verdict.reason


def test_a_pickle_in_a_published_checkpoint_is_refused() -> None:
    """The manifest proves that all is there, not that it is good."""
    files = {"model.safetensors": pickle.dumps(1)}
    assert isinstance(look(folder_of(files | {"weighbridge.json": manifest(files)}), RUN), Refused)


def test_what_changes_under_the_look_waits() -> None:
    """Replaced, grown or deleted between the listing and the verdict: look again later."""

    class Busy(MemoryStore):
        change: Callable[[], object] | None = None

        def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
            data = super().get(key, start=start, end=end, if_match=if_match)
            if self.change is not None:
                self.change, change = None, self.change
                change()
            return data

    for change in (
        lambda s: s.put(RUN + "model.safetensors", safetensors()),
        lambda s: s.put(RUN + "more.json", b"{}"),
        lambda s: s.delete(RUN + "model.safetensors"),
        lambda s: s.delete(RUN + "config.json"),
    ):
        store = Busy()
        put(store, {"model.safetensors": safetensors(), "config.json": b"{}"})
        store.change = lambda change=change, store=store: change(store)
        assert "changed while it was looked at" in waits(look(store, RUN))


def test_a_stale_listing_waits() -> None:
    """Objects listed before they were replaced are not taken for what is there now."""
    store = folder_of({"model.safetensors": safetensors()})
    stale = listed(store, RUN)
    put(store, {"model.safetensors": safetensors()})
    assert "changed while it was looked at" in waits(assess(store, stale, path=RUN))


def test_nothing_there_waits() -> None:
    """An empty folder, or an object that went away, is no error."""
    assert "nothing at digits/run-1/ yet" in waits(look(MemoryStore(), RUN))


def test_a_file_open_for_writing_waits(tmp_path: Path) -> None:
    """A preallocated file looks whole by its length; its open writer gives it away. Readers do not matter."""
    store = FolderStore(tmp_path, durable=False)
    path = tmp_path / "a.safetensors"
    with path.open("wb") as writer:
        writer.write(safetensors())
        writer.flush()
        assert waits(look(store, "a.safetensors")) == "a.safetensors is still open for writing"
    with path.open("rb"):
        assert isinstance(look(store, "a.safetensors"), Complete)


def test_where_writers_cannot_be_seen_quiet_must_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without leases a file has to rest first; the reason says so."""
    monkeypatch.setattr(FolderStore, "has_writer", lambda self, key: None)
    store = FolderStore(tmp_path, durable=False)
    changed = store.put("a.safetensors", safetensors()).modified
    reason = waits(look(store, "a.safetensors", now=changed + timedelta(seconds=4)))
    assert "changed 4 s ago; writers cannot be seen here: 30 s must be quiet" in reason
    assert isinstance(look(store, "a.safetensors", now=changed + timedelta(seconds=31)), Complete)


def test_pins_tell_contents_apart() -> None:
    """The digest ignores order and depends on every key, size and identity; the same bytes put again are new."""
    store = folder_of(sharded())
    refs = [pin(info) for info in store.list(RUN)]
    digest = pins_digest(refs)
    assert digest == pins_digest(reversed(refs))
    assert len(digest) == 64
    put(store, {"config.json": b'{"model_type": "mlp"}'})
    assert pins_digest(pin(info) for info in store.list(RUN)) != digest
    versioned = Ref("a", 1, "etag", "v1", "2026-01-01T00:00:00+00:00")
    assert pins_digest([versioned]) == pins_digest([replace(versioned, modified="other", etag="other")])
    for other in (replace(versioned, key="b"), replace(versioned, size=2), replace(versioned, version_id=None)):
        assert pins_digest([other]) != pins_digest([versioned])


@given(data=st.data(), publish=st.booleans())
@settings(max_examples=60, deadline=None)
def test_uploads_in_any_order_with_truncated_tries_are_never_complete_early(data: st.DataObject, publish: bool) -> None:
    """Files arrive in random order, some truncated first: complete exactly when the last needed byte is there."""
    files = {name: body for name, body in sharded(2).items() if name != "README.md"}
    if publish:
        files["weighbridge.json"] = manifest(files)
    steps: list[tuple[str, bytes]] = []
    for name, body in files.items():
        cuts = data.draw(st.lists(st.integers(0, len(body) - 1), max_size=2))
        steps += [(name, body[:cut]) for cut in sorted(cuts)] + [(name, body)]
    order = data.draw(st.permutations(range(len(steps))))
    # Any interleaving in which each file's own tries stay in order.
    queues = {name: iter([body for other, body in steps if other == name]) for name in files}
    store = MemoryStore()
    needed = set(files) - (set() if publish else {"config.json"})
    for position in order:
        name = steps[position][0]
        store.put(RUN + name, next(queues[name]))
        verdict = look(store, RUN)
        there = {n for n, body in files.items() if RUN + n in store._objects and store.get(RUN + n) == body}
        # Without a manifest nothing says that config.json belongs to it; with it, P2 may come before P0.
        weights = {n for n in needed if n not in ("weighbridge.json", "config.json")}
        expected = there >= needed if RUN + "weighbridge.json" in store._objects else there >= weights
        assert isinstance(verdict, Complete) == expected, (verdict, there)
        assert isinstance(verdict, Complete | Waiting), verdict


@pytest.mark.parametrize("end", [*names.UNFINISHED, *names.BESIDE, ".ARIA2", ".CrDownload"])
def test_a_downloaders_file_beside_it_marks_a_file_unfinished(end: str) -> None:
    """Preallocated at full length, it looks whole; the name says which mark holds it back. It goes, and it is whole."""
    store = MemoryStore()
    store.put("digits/a.safetensors", safetensors())
    mark = f"digits/a.safetensors{end}" if not end.startswith("-") else f"digits/a{end}"
    store.put(mark, b"")
    assert mark in waits(look(store, "digits/a.safetensors"))
    store.delete(mark)
    assert isinstance(look(store, "digits/a.safetensors"), Complete)


@pytest.mark.parametrize("end", [".aria2", ".st", "~", ".part", ".download", ".FilePart"])
def test_a_downloaders_file_in_a_folder_marks_it_unfinished(end: str) -> None:
    """Beside the file that it fetches, at any depth; and beside the folder."""
    whole = {"model.safetensors": safetensors()}
    assert f"model.safetensors{end}" in waits(look(folder_of({**whole, f"model.safetensors{end}": b""}), RUN))
    deep = {**whole, "tokenizer/vocab.txt": b"", f"tokenizer/vocab.txt{end}": b""}
    assert f"vocab.txt{end}" in waits(look(folder_of(deep), RUN))
    if end != "~":
        store = folder_of(whole)
        store.put(f"{RUN.removesuffix('/')}{end}", b"")
        assert end in waits(look(store, RUN))


@pytest.mark.parametrize(
    "neighbour",
    [
        *("digits/run-1-unfinished-business/model.safetensors", "digits/run-10-unfinished.txt", "digits/run-1.aria2x"),
        *("digits/run-1-unfinished2", "digits/run-10.part", "digits/run-1-copy.tmp/x", "digits/x-run-1-unfinished"),
    ],
)
def test_a_mark_is_a_whole_name(neighbour: str) -> None:
    """Names that merely begin, or end, like one belong to others."""
    store = folder_of({"model.safetensors": safetensors()})
    store.put(neighbour, safetensors())
    assert isinstance(look(store, RUN), Complete)


def test_ambiguous_ends_mark_nothing_by_themselves() -> None:
    """A file `x.st` without an `x` beside it is just a name."""
    store = folder_of({"model.safetensors": safetensors(), "state.st": b"", "notes~": b""})
    assert isinstance(look(store, RUN), Complete)


@pytest.mark.parametrize("name", ["tmp-checkpoint-500", "42.orbax-checkpoint-tmp-17", "run.tmp", "run.FILEPART"])
def test_staging_folders_are_unfinished(name: str) -> None:
    """The names under which trainers write before they rename."""
    assert names.is_unfinished(f"{name}/model.safetensors")
    assert not names.is_unfinished(f"x{name}x/model.safetensors")
