"""JSON of any size from strangers costs a piece of it, and little time."""

from __future__ import annotations

import io
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from fixtures.checkpoints import raw, safetensors
from hypothesis import given
from hypothesis import strategies as st

from weighbridge.storage import json_stream
from weighbridge.storage.completeness import Complete, Refused, Waiting, look
from weighbridge.storage.index import MalformedIndex, read_index
from weighbridge.storage.json_stream import JsonStream
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin
from weighbridge.storage.safetensors_header import MalformedHeader, read_header
from weighbridge.storage.strict_json import InvalidJson, TruncatedJson

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def members(data: bytes) -> dict[str, Any]:
    reader = JsonStream(io.BytesIO(data))
    found = {name: reader.value(1 << 20) for name in reader.members(names=1000, count=1000)}
    reader.end()
    return found


@given(st.dictionaries(st.text(), JSON, max_size=6), st.integers(1, 9), st.booleans())
def test_it_reads_what_json_reads(value: dict[str, Any], piece: int, ascii_: bool) -> None:
    """In pieces of any size, cut inside characters, numbers and escapes."""
    text = json.dumps(value, ensure_ascii=ascii_, indent=piece % 3)
    before, json_stream._PIECE = json_stream._PIECE, piece
    try:
        assert members(text.encode()) == value
    finally:
        json_stream._PIECE = before


@given(st.dictionaries(st.text("abcé\\", min_size=1), st.integers() | st.text() | st.booleans(), min_size=1), st.data())
def test_what_is_broken_off_says_so(value: dict[str, Any], data: st.DataObject) -> None:
    """At any byte: more may come."""
    text = json.dumps(value, ensure_ascii=False).encode()
    with pytest.raises(TruncatedJson):
        members(text[: data.draw(st.integers(0, len(text) - 1))])


@pytest.mark.parametrize(
    "text",
    [b"[]", b"1", b'{"a" 1}', b'{"a": 1,}', b'{"a": 1 "b": 2}', b'{"a": NaN}', b'{"a": 1} x', b'{1: 2}', b"{'a': 1}",
     b'{"a": [1, {"b": 1, "b": 2}]}', b'{"a": "\xff"}', b'{"a": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}"],
)  # fmt: skip
def test_what_is_wrong_is_not_waited_for(text: bytes) -> None:
    """No further byte makes it an object."""
    with pytest.raises(InvalidJson) as caught:
        members(text)
    assert not isinstance(caught.value, TruncatedJson)


MIB = 1 << 20
BOMBS: dict[str, Callable[[], bytes]] = {
    "lists in an entry": lambda: b'{"a": [' + b"[]," * (2 * MIB) + b"[]]}",
    "lists in the map": lambda: b'{"weight_map": [' + b"[]," * (2 * MIB) + b"[]]}",
    "lists in metadata": lambda: b'{"metadata": {"x": [' + b"[]," * (2 * MIB) + b"[]]}}",
    "objects": lambda: b'{"weight_map": {"a": ' + b'{"a":' * MIB + b"1" + b"}" * MIB + b"}}",
    "one long name": lambda: b'{"' + b"x" * (6 * MIB) + b'": 1}',
    "one long value": lambda: b'{"weight_map": {"a": "' + b"x" * (6 * MIB) + b'"}}',
    "escapes": lambda: b'{"weight_map": {"' + b"\\u0041" * MIB + b'": "a.safetensors"}}',
    "spaces": lambda: b'{"weight_map": ' + b" " * (6 * MIB) + b"{}}",
    "many fields": lambda: b"{" + b",".join(b'"%d":1' % n for n in range(500_000)) + b"}",
    "astral": lambda: ('{"weight_map": {"' + "\U0001f600" * MIB + '": 1}}').encode(),
    "digits": lambda: b'{"weight_map": ' + b"1" * (6 * MIB) + b"}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_neither_memory_nor_time(name: str) -> None:
    """As an index, and as a header: refused, in less than half of what json.loads would hold for the bytes alone."""
    store = MemoryStore()
    index = pin(store.put("a.safetensors.index.json", BOMBS[name]()))
    header = pin(store.put("b.safetensors", raw(BOMBS[name]())))
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(MalformedIndex):
            read_index(store, index)
        with pytest.raises(MalformedHeader):
            read_header(store, header)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The store in memory holds what is read of it once more.
    assert peak - index.size < 24 * MIB
    assert time.process_time() - start < 4


def test_a_large_header_that_is_good_is_read() -> None:
    """18 MB of names: more than was once called impossible, less than the format's limit."""
    tensors = {f"{'layer' * 100}.{number:06}": ("U8", [1], b"1") for number in range(33_000)}
    store = MemoryStore()
    header = read_header(store, pin(store.put("a.safetensors", safetensors(tensors))))
    assert header.length > 17_800_000
    assert len(header.tensors) == 33_000


def test_a_header_is_larger_than_a_limit_and_never_impossible() -> None:
    """The words say whose limit it is."""
    store = MemoryStore()
    for length in (100_000_001, 1 << 40, (1 << 64) - 1):
        data = length.to_bytes(8, "little") + b"{"
        verdict = look_at(store, data)
        assert isinstance(verdict, Refused)
        assert "larger than the limit of 100,000,000" in verdict.reason
    assert isinstance(look_at(store, (100_000_000).to_bytes(8, "little") + b"{"), Waiting)


def look_at(store: MemoryStore, data: bytes) -> Any:
    store.put("m/a.safetensors", data)
    return look(store, "m/a.safetensors")


def test_many_shards_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand headers that are each within the limits would not be."""
    monkeypatch.setattr("weighbridge.storage.completeness.MAX_TENSORS", 5)
    store = MemoryStore()
    for number in range(3):
        store.put(f"m/run/{number}.safetensors", safetensors({f"{number}.{n}": ("U8", [1], b"1") for n in range(2)}))
    verdict = look(store, "m/run/")
    assert isinstance(verdict, Refused)
    assert "more than 5 tensors" in verdict.reason


def test_large_ones_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits until the first is done; small ones wait for nobody."""
    from weighbridge.storage import completeness

    monkeypatch.setattr(completeness, "LARGE", 10)
    entered = []

    class Lock:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    monkeypatch.setattr(completeness, "_ONE_LARGE", Lock())
    store = MemoryStore()
    store.put("m/a.safetensors", safetensors())
    assert isinstance(look(store, "m/a.safetensors"), Complete)
    assert entered == ["in", "out"]
