"""Headers: what is valid, what is short, and what is wrong for ever."""

from __future__ import annotations

import contextlib
import pickle
import struct

import pytest
from fixtures.checkpoints import raw, safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weighbridge.storage import safetensors_header
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin
from weighbridge.storage.safetensors_header import Header, MalformedHeader, ShortFile


def read(data: bytes) -> Header:
    store = MemoryStore()
    return safetensors_header.read_header(store, pin(store.put("digits/a.safetensors", data)))


def tensor(dtype: str = "F32", shape: object = None, start: object = 0, end: object = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [start, end]}


def test_a_valid_header_is_read() -> None:
    """Tensors, metadata and sizes come out; empty tensors, scalars, sub-byte dtypes and padding are fine."""
    data = safetensors(
        {"a": ("BF16", [2, 3], bytes(12)), "none": ("F32", [0, 7], b""), "scalar": ("I64", [], bytes(8)),
         "four": ("F4", [6], bytes(3)), "../name": ("U8", [1], b"1")},
        format="pt",
    )  # fmt: skip
    header = read(data)
    assert header.tensors["a"] == safetensors_header.TensorInfo("BF16", (2, 3), 0, 12)
    assert header.metadata == {"format": "pt"}
    assert header.expected_size == len(data)
    padded = raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}   ', b"x")
    assert read(padded).data_size == 1


def test_what_safetensors_writes_is_valid() -> None:
    """The reference library's own files pass."""
    numpy = pytest.importorskip("numpy")
    save = pytest.importorskip("safetensors.numpy").save
    arrays = {"w": numpy.arange(6, dtype="float32").reshape(2, 3), "b": numpy.zeros(0), "c": numpy.array(True)}
    assert read(save(arrays, {"a": "b"})).tensors.keys() == arrays.keys()


@pytest.mark.parametrize("have", [0, 1, 7, 8, 9, 30, -1])
def test_a_short_file_says_how_much_is_missing(have: int) -> None:
    """Every beginning of a valid file is short, not wrong, and the message counts the bytes."""
    data = safetensors()
    have %= len(data)
    with pytest.raises(ShortFile, match=rf"a.safetensors has {have} of \d+ bytes") as caught:
        read(data[:have])
    assert caught.value.have == have < caught.value.need <= len(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps({"weights": [1, 2, 3]}, protocol=2), "Python pickle"),
        (pickle.dumps({"weights": list(range(300))}, protocol=4), "Python pickle"),
        (pickle.dumps([1], protocol=0), "larger than the limit of 100,000,000"),
        (b"PK\x03\x04" + bytes(30), "zip archive, as torch.save writes"),
        (b'{"a": 1}' * 3, "JSON text without the length"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (struct.pack("<Q", 120 << 20) + b"{}", "a header of 125,829,120 bytes, larger than the limit of 100,000,000"),
        (bytes(64), "no JSON object"),
        (struct.pack("<Q", 1) + b"{", "has a header of 1 bytes"),
        (raw(b"[1, 2]"), "no JSON object"),
        (raw(b"{broken}"), "no valid JSON"),
        (raw(b'{"a": NaN}'), "NaN is no JSON"),
        (raw(b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"), "no acceptable JSON"),
        (raw(b'{"a": ' + b"9" * 5_000 + b"}"), "no acceptable JSON"),
        (raw(b'{"a\xff": 1}'), "not UTF-8"),
        (raw(b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}'), "'a' is there twice"),
        (raw({"__metadata__": {"a": 1}}), "__metadata__"),
        (raw({"w": 1}), "'w' needs exactly"),
        (raw({"w": tensor() | {"more": 1}}), "'w' needs exactly"),
        (raw({"w": tensor("F33")}), "unknown dtype 'F33'"),
        (raw({"w": tensor(shape=[True])}), "shape"),
        (raw({"w": tensor(shape=[-1])}), "shape"),
        (raw({"w": tensor(shape=[1.0])}), "shape"),
        (raw({"w": tensor(shape=[1] * 33)}), "shape"),
        (raw({"w": tensor(start=4, end=0)}), "data_offsets"),
        (raw({"w": tensor(end="4")}), "data_offsets"),
        (raw({"w": tensor(shape=[2**62] * 32)}, bytes(4)), "more than 2\\^63 bytes"),
        (raw({"w": tensor(shape=[2])}, bytes(4)), "needs 64 bits, its offsets span 4 bytes"),
        (raw({"w": tensor("F4", shape=[3], end=1)}, bytes(4)), "12 bits"),
        (raw({"a": tensor(), "b": tensor(start=2, end=6)}, bytes(6)), "'b' overlaps"),
        (raw({"a": tensor(), "b": tensor(start=6, end=10)}, bytes(10)), "'b' leaves a hole"),
        (raw({"a": tensor(start=1, end=5)}, bytes(5)), "'a' leaves a hole"),
        (raw({"": tensor()}, bytes(4)), "unprintable name"),
        (raw(b'{"\\ud800": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"), "unprintable name"),
        (safetensors() + b"!", "by its header"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_by_itself_is_malformed(data: bytes, reason: str) -> None:
    """The message names the file, the tensor where there is one, and the rule."""
    with pytest.raises(MalformedHeader, match=reason) as caught:
        read(data)
    assert "digits/a.safetensors" in str(caught.value)


def test_a_foreign_file_is_told_by_its_first_bytes() -> None:
    """A pickle named .safetensors is wrong at once, however little of it has arrived."""
    for data in (pickle.dumps({"a": 1}, protocol=2)[:4], b"PK\x03\x04\x14\0\0\0"):
        with pytest.raises(MalformedHeader):
            read(data)


def test_too_many_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is capped before anything is done per tensor."""
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 3)
    with pytest.raises(MalformedHeader, match="4 tensors, more than our limit of 3"):
        read(safetensors({str(n): ("U8", [1], b"1") for n in range(4)}))


def test_a_large_header_takes_two_reads() -> None:
    """A header beyond the first read is fetched by exactly one more range."""

    class Counting(MemoryStore):
        gets = 0

        def get(self, *args: object, **kwargs: object) -> bytes:
            self.gets += 1
            return super().get(*args, **kwargs)  # type: ignore[arg-type]

    for count, reads in ((10, 1), (2_000, 2)):
        store = Counting()
        data = safetensors({f"layers.{n}.weight": ("U8", [1], b"1") for n in range(count)})
        header = safetensors_header.read_header(store, pin(store.put("a.safetensors", data)))
        assert (len(header.tensors), store.gets) == (count, reads)


@given(st.binary(max_size=200))
@example(b"\x80")
@example(raw(b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}}'))
@settings(max_examples=150, deadline=None)
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    """Random bytes, bare or as a header, are valid, short or malformed: no other end."""
    for candidate in (data, raw(b"{" + data), raw(b'{"a":' + data + b"}", b"1234")):
        with contextlib.suppress(MalformedHeader, ShortFile):
            read(candidate)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
near_tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F4", "U8", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=5), near_tensors | json_values, max_size=4))
@settings(max_examples=150, deadline=None)
def test_no_json_crashes_the_reader(header: dict[str, object]) -> None:
    """JSON that is almost a header is valid, short or malformed: no other end."""
    with contextlib.suppress(MalformedHeader, ShortFile):
        read(raw(header, bytes(40)))
