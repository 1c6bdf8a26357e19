"""`publish`: a checkpoint is whole in the store, or nobody takes it for one."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO

import pytest
from fixtures.checkpoints import safetensors, sharded

from weighbridge.storage import claims
from weighbridge.storage.claims import Holder
from weighbridge.storage.completeness import Complete, Proof, Waiting, look
from weighbridge.storage.errors import AlreadyPublished, InvalidName, StorageFull
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import ObjectInfo, Store
from weighbridge.storage.publish import publish
from weighbridge.storage.published import read_published
from weighbridge.storage.safetensors_header import read_header
from weighbridge.storage.streaming import digest_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint on disk, with clutter."""
    for name, data in sharded().items():
        (tmp_path / name).write_bytes(data)
    for clutter in (".git/config", "x.tmp", "weighbridge.json"):
        (tmp_path / clutter).parent.mkdir(exist_ok=True)
        (tmp_path / clutter).write_bytes(b"clutter")
    return tmp_path


def test_a_folder_is_published_whole(any_store: Store, folder: Path) -> None:
    """All files but clutter arrive; the manifest is the proof; the progress ends at all bytes."""
    steps: list[tuple[str, int, int]] = []
    result = publish(
        folder, "digits", "run-1", store=any_store, golden={"input.x": [1.0]}, metadata={"commit": "abc"},
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    verdict = look(any_store, "digits/run-1/")
    assert isinstance(verdict, Complete), verdict
    assert verdict.proof is Proof.P0
    names = {*sharded(), "golden.safetensors"}
    assert {ref.key for ref in verdict.files} == {f"digits/run-1/{n}" for n in (*names, "weighbridge.json")}
    assert {info.key for info in any_store.list()} == {ref.key for ref in verdict.files}
    manifest = read_published(any_store, pin(any_store.head("digits/run-1/weighbridge.json")))
    assert (manifest.files, manifest.metadata) == (result.files, {"commit": "abc"})
    assert steps[-1][1:] == (result.size, result.size)


def test_tensors_are_published(any_store: Store) -> None:
    """Arrays by name become a safetensors file."""
    publish({"w": [[1, 2], [3, 4]]}, "digits", "run-1", store=any_store)
    header = read_header(any_store, pin(any_store.head("digits/run-1/model.safetensors")))
    assert header.tensors["w"].shape == (2, 2)


def test_a_published_name_is_taken(any_store: Store, folder: Path) -> None:
    """The second publication fails before it touches anything, and says to choose another name."""
    publish(folder / "model-00001-of-00003.safetensors", "digits", "run-1", store=any_store)
    before = list(any_store.list())
    with pytest.raises(AlreadyPublished, match="digits/run-1/ is already published"):
        publish(folder, "digits", "run-1", store=any_store)
    assert list(any_store.list()) == before


def test_a_publication_that_broke_off_waits_and_can_be_repeated(folder: Path) -> None:
    """Until the manifest is there, no look finds it complete, though every single file is whole."""

    class Failing(MemoryStore):
        left = 100
        looks: list[object] = []  # noqa: RUF012

        def put(self, key: str, data: bytes | IO[bytes] | Path, *, if_none_match: bool = False) -> ObjectInfo:
            self.looks.append(look(self, "digits/run-1/"))
            if self.left == 0:
                raise StorageFull("no space left")
            self.left -= 1
            return super().put(key, data, if_none_match=if_none_match)

    store = Failing()
    for self_left in range(1, 8):
        store.left = self_left
        with pytest.raises(StorageFull):
            publish(folder, "digits", "run-1", store=store)
        assert isinstance(look(store, "digits/run-1/"), Waiting)
    store.left = 100
    publish(folder, "digits", "run-1", store=store)
    assert all(isinstance(seen, Waiting) for seen in store.looks)
    assert isinstance(look(store, "digits/run-1/"), Complete)


@pytest.mark.parametrize(
    ("model", "name"),
    [("", "a"), ("a/b", "a"), ("a:b", "a"), (".a", "a"), ("a", ""), ("a", ".."), ("a", "b/c"), ("a", "b\\c"),
     ("a", "b\n"), ("a", "b "), ("a", "x.tmp"), ("a", "recipe.yaml"), ("é" * 200, "a")],
)  # fmt: skip
def test_bad_names_are_refused(model: str, name: str) -> None:
    """Names that would be paths, markers or reserved are refused with the rule, before any put."""
    store = MemoryStore()
    with pytest.raises(InvalidName, match="not a valid"):
        publish({"w": [1]}, model, name, store=store)
    assert list(store.list()) == []


def test_sources_without_weights_are_refused(tmp_path: Path) -> None:
    """A missing path, an empty folder, a folder without weights, and a reserved name: nothing is put."""
    store = MemoryStore()
    (tmp_path / "empty").mkdir()
    (tmp_path / "golden.safetensors").write_bytes(safetensors())
    for source, error in (
        (tmp_path / "nope", FileNotFoundError),
        (tmp_path / "empty", InvalidName),
        (tmp_path, InvalidName),
        (tmp_path / "golden.safetensors", InvalidName),
    ):
        with pytest.raises(error):
            publish(source, "digits", "run-1", store=store)
    assert list(store.list()) == []


@pytest.mark.slow
def test_torch_tensors_are_published() -> None:
    """Parameters need no preparation: gradients, views and tied weights are written as plain tensors."""
    torch = pytest.importorskip("torch")
    tied = torch.nn.Parameter(torch.ones(2, 3))
    store = MemoryStore()
    publish({"a": tied, "b": tied, "c": torch.arange(6).view(2, 3).T}, "digits", "run-1", store=store)
    header = read_header(store, pin(store.head("digits/run-1/model.safetensors")))
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (2, 3), "b": (2, 3), "c": (3, 2)}


def test_of_many_at_once_one_publishes_and_the_others_touch_nothing(any_store: Store) -> None:
    """Whoever loses is told so before its first byte; the winner's digests hold."""
    together, told = threading.Barrier(4), list[str]()

    def run(number: int) -> None:
        together.wait()
        try:
            publish({"w": [number] * 1000}, "digits", "run-1", store=any_store)
        except AlreadyPublished as error:
            told.append(str(error))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 3
    assert all("choose another name" in one for one in told)
    manifest = read_published(any_store, pin(any_store.head("digits/run-1/weighbridge.json")))
    [file] = manifest.files
    assert digest_bytes(any_store.get("digits/run-1/model.safetensors")) == file.digest
    assert not [info.key for info in any_store.list() if info.key.endswith("-unfinished")]


def test_while_one_publishes_another_is_told_who_and_until_when() -> None:
    """Its files are not touched; the message names the process."""

    class Slow(MemoryStore):
        def put(self, key: str, data: bytes | IO[bytes] | Path, *, if_none_match: bool = False) -> ObjectInfo:
            if key.endswith("model.safetensors"):
                with pytest.raises(AlreadyPublished, match=rf"is being published by process {os.getpid()} on .*UTC"):
                    publish({"w": [2]}, "digits", "run-1", store=self)
            return super().put(key, data, if_none_match=if_none_match)

    store = Slow()
    publish({"w": [1]}, "digits", "run-1", store=store)
    assert isinstance(look(store, "digits/run-1/"), Complete)


HOLDER = {"machine": "elsewhere", "process": 1, "started": "1", "token": "x", "given_up": False}


@pytest.mark.parametrize(
    ("holder", "age", "free"),
    [
        (HOLDER, 599, False),
        (HOLDER, 601, True),
        ({**HOLDER, "given_up": True}, 0, True),
        (asdict(Holder.me()), 0, True),
        ({**asdict(Holder.me()), "process": 2**22 + 1}, 0, True),
        ({**asdict(Holder.me()), "process": os.getppid(), "started": "1"}, 0, True),
        (None, 599, False),
        (None, 601, True),
    ],
)
def test_a_dead_publishers_claim_is_taken_over(holder: dict[str, object] | None, age: float, free: bool) -> None:
    """It gave up, its process is gone from this machine, or it was silent for ten minutes; else it keeps the name."""
    store, now = MemoryStore(), time.time()
    store.put("m/run/weighbridge-unfinished", json.dumps(holder).encode() if holder else b"")
    if not free:
        with pytest.raises(AlreadyPublished, match="being published"):
            claims.take(store, "m/run/", clock=lambda: now + age)
        return
    claim = claims.take(store, "m/run/", clock=lambda: now + age)
    claim.prove()
    claim.release()
    assert list(store.list()) == []


def test_a_publisher_that_was_taken_over_sends_no_further_file() -> None:
    """It finds the next claim before its next byte, and when it renews its own."""
    store, now = MemoryStore(), time.time()
    first = claims.take(store, "m/run/", clock=lambda: now)
    store.put("m/run/weighbridge-1-unfinished", json.dumps(HOLDER).encode())
    with pytest.raises(AlreadyPublished, match="took m/run/ over"):
        first.prove()
    now += claims.RENEW
    with pytest.raises(AlreadyPublished, match="took m/run/ over"):
        first.renew()
    first.release()
    assert [info.key for info in store.list()] == ["m/run/weighbridge-1-unfinished"]
