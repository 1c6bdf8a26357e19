"""`publish`: a checkpoint is whole in the store, or nobody takes it for one."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pytest
from fixtures.checkpoints import safetensors, sharded

from weighbridge.storage.completeness import Complete, Proof, Waiting, look
from weighbridge.storage.errors import AlreadyPublished, InvalidName, StorageFull
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import ObjectInfo, Store
from weighbridge.storage.publish import publish
from weighbridge.storage.published import read_published
from weighbridge.storage.safetensors_header import read_header


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
