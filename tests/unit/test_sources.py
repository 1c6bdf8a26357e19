"""What can only be refused is refused before a byte is sent, with the file, the rule and what to do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.checkpoints import raw, safetensors, sharded

from weighbridge.storage.errors import NotPublishable
from weighbridge.storage.lineage import InvalidMetadata
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin
from weighbridge.storage.publish import publish
from weighbridge.storage.safetensors_header import read_header

PICKLE = pickle.dumps({"weights": [1.0, 2.0]})
W = {"w": ("F32", [4], bytes(16))}
INDEX = json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}})


def refused(source: Any, store: MemoryStore | None = None, **more: Any) -> str:
    """Why it is refused; nothing was put."""
    store = store or MemoryStore()
    with pytest.raises(NotPublishable) as error:
        publish(source, "digits", "run-1", store=store, **more)
    assert list(store.list()) == []
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model.pt", b"PK\x03\x04", "model.pt: format .pt is not supported yet: publish safetensors"),
        ("model.onnx", b"onnx", "format .onnx"),
        ("README.md", b"# hello", "no .safetensors file"),
        ("model.SAFETENSORS", safetensors(), "call model.SAFETENSORS model.safetensors"),
        ("model.safetensors", PICKLE, "model.safetensors is a Python pickle"),
        ("model.safetensors", b"PK\x03\x04" + bytes(60), "is a zip archive"),
        ("model.safetensors", b"", "has 0 of 8 bytes"),
        ("model.safetensors", safetensors()[:-1], "bytes"),
        ("model.safetensors", safetensors() + b"x", "by its header"),
        ("model.safetensors", safetensors({}), "no tensors in model.safetensors"),
        ("model.safetensors", raw({"": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)), "name"),
        ("golden.safetensors", safetensors(), "reserved"),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoint(tmp_path: Path, name: str, content: bytes, why: str) -> None:
    """By its name or by its first bytes."""
    (tmp_path / name).write_bytes(content)
    assert why in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "it has no files"),
        ({"config.json": b"{}"}, "no .safetensors file"),
        ({"pytorch_model.bin": b"PK", "config.json": b"{}"}, "format .bin is not supported yet"),
        ({"x.safetensors.tmp": safetensors()}, "unfinished and hidden ones are left out"),
        ({"a.safetensors": safetensors(), "b.safetensors": safetensors()}, "'w' is both in a.safetensors and in b"),
        ({"model-00001-of-00002.safetensors": safetensors(W), "model.safetensors.index.json": INDEX.encode()},
         "names model-00002-of-00002.safetensors, which is not there"),
        ({"model-00001-of-00002.safetensors": safetensors(W), "model-00002-of-00002.safetensors":
          safetensors({"u": W["w"]}), "model.safetensors.index.json": INDEX.encode()}, "says that 'v' is in"),
        ({"model.safetensors": safetensors(W), "model.safetensors.index.json": b"[]"}, "index.json"),
        ({"model-00001-of-00003.safetensors": safetensors(W), "config.json": b"{}"}, "no file number 2 of 3"),
        ({"model.safetensors": safetensors(), "golden.safetensors": PICKLE}, "golden.safetensors is a Python pickle"),
    ],
)  # fmt: skip
def test_folders_that_are_no_checkpoint(tmp_path: Path, files: dict[str, bytes], why: str) -> None:
    """Empty, without weights, with too few or too many of them."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert why in refused(tmp_path)


def test_a_bad_golden_is_refused_with_its_file(tmp_path: Path) -> None:
    """It is sent with the checkpoint, and would reject it."""
    (tmp_path / "g").write_bytes(PICKLE)
    assert "golden.safetensors is a Python pickle" in refused({"w": [1.0]}, golden=tmp_path / "g")
    assert "no tensors to publish" in refused({"w": [1.0]}, golden={})


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({}, "no tensors to publish"),
        ({float("nan"): [1.0]}, "the name nan is float"),
        ({1: [1.0]}, "the name 1 is int"),
        ({None: [1.0]}, "the name None is NoneType"),
        ({b"w": [1.0]}, "is bytes"),
        ({"": [1.0]}, "no tensor can be named ''"),
        ({"a\n": [1.0]}, "no tensor can be named"),
        ({"__metadata__": [1.0]}, "no tensor can be named '__metadata__'"),
        ({"w": None}, "'w' is NoneType"),
        ({"w": "text"}, "'w' is str"),
        ({"w": object()}, "'w' is object"),
        ({"model": {"w": [1.0]}}, "publish its parts one by one, such as checkpoint['model']"),
        ({"w": [[1.0], [2.0, 3.0]]}, "'w' is list, not a tensor"),
        ({"w": np.array(["2026-01-01"], dtype="datetime64[D]")}, "datetime64"),
    ],
)
def test_tensors_that_are_none(tensors: dict[Any, Any], why: str) -> None:
    """The name, what is there, and the rule; not an error of some library."""
    assert why in refused(tensors)


class Module:
    def state_dict(self) -> dict[str, Any]:
        return {"w": [1.0]}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (Module(), "Module is neither a file, a folder nor tensors by name: publish its state_dict()"),
        (None, "NoneType is neither"),
        ([[1.0]], "list is neither"),
        (b"model.safetensors", "bytes is neither"),
        ("", "the path is empty"),
    ],
)
def test_what_is_neither_a_path_nor_tensors(source: Any, why: str) -> None:
    """A module, nothing, and the empty path, which would be the folder one happens to stand in."""
    assert why in refused(source)


def test_what_is_said_in_metadata_is_text() -> None:
    """Numbers and the like are refused before the upload, and what is too long says where it belongs."""
    for given, why in (
        ({"epoch": 3}, "metadata 'epoch' is int, not text: give str(…)"),
        ({1: "x"}, "is int, not text"),
        ({"": "x"}, "printable"),
        ({"a\n": "x"}, "printable"),
        ({"log": "x" * 5000}, "put a longer text into a file"),
        ({"nul": "\0"}, "without NUL"),
        (["commit"], "list is no mapping"),
        ({f"k{n}": "x" for n in range(65)}, "at most 64 entries"),
    ):
        store = MemoryStore()
        for option in ("metadata", "tags"):
            with pytest.raises(InvalidMetadata) as error:
                publish({"w": [1.0]}, "digits", "run-1", store=store, **{option: given})  # type: ignore[arg-type]
            assert why.replace("metadata", "tag" if option == "tags" else option) in str(error.value)
        assert list(store.list()) == []


def test_what_is_a_checkpoint_is_published(tmp_path: Path) -> None:
    """Shards with their index, a folder of links as a cache has them, scalars, other endianness, several files."""
    for name, data in sharded().items():
        (tmp_path / name).write_bytes(data)
    publish(tmp_path, "digits", "shards", store=MemoryStore())
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "blob").write_bytes(safetensors())
    (cache / "model.safetensors").symlink_to(tmp_path / "blob")
    publish(cache, "digits", "cache", store=MemoryStore())
    store = MemoryStore()
    publish({"a": np.float32(3), "b": np.arange(3, dtype=">i4"), "c": True}, "digits", "run", store=store)
    header = read_header(store, pin(store.head("digits/run/model.safetensors")))
    assert {name: (one.dtype, one.shape) for name, one in header.tensors.items()} == {
        "a": ("F32", ()),
        "b": ("I32", (3,)),
        "c": ("BOOL", ()),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda torch: {"w": torch.ones(2, device="meta")}, "'w' is on the meta device"),
        (lambda torch: {"w": torch.ones(2).to_sparse()}, "'w' is sparse or quantized"),
        (lambda torch: {"w": torch.ones(2), "v": None}, "'v' is NoneType"),
        (lambda torch: {"model": {"w": torch.ones(2)}, "w": torch.ones(1)}, "checkpoint['model']"),
        (lambda torch: {float("nan"): torch.ones(2)}, "the name nan is float"),
    ],
)
def test_torch_tensors_that_are_none(make: Callable[[Any], dict[Any, Any]], why: str) -> None:
    """The same for a state dict."""
    assert why in refused(make(pytest.importorskip("torch")))


@pytest.mark.slow
def test_tensors_that_share_memory_are_written_each_by_itself() -> None:
    """Tied weights, views of one tensor that overlap or not, arrays of numpy beside torch's."""
    torch = pytest.importorskip("torch")
    whole, store = torch.arange(12.0).reshape(3, 4), MemoryStore()
    given = {"a": whole, "b": whole, "c": whole[1:], "d": whole[0], "e": whole.T, "f": np.ones(2, "float32"), "g": 1}
    publish(given, "digits", "run", store=store)
    import safetensors.numpy

    found = safetensors.numpy.load(store.get("digits/run/model.safetensors"))
    for name, value in given.items():
        assert np.array_equal(found[name], np.asarray(value)), name
