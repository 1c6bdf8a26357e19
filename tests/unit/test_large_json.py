"""A large JSON request read in pieces is what it is read whole, or the same refusal."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge.hosts import codec, large_json
from weighbridge.hosts.errors import BadRequest, HostError, TooLarge


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is a large one, in pieces of a few numbers."""
    monkeypatch.setattr(large_json, "LARGE", 0)
    monkeypatch.setattr(large_json, "_PIECE", 7)
    monkeypatch.setattr(large_json, "_WINDOW", 16)


def whole(body: bytes, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(large_json, "LARGE", 1 << 30)
        return outcome(body)


def outcome(body: bytes) -> Any:
    try:
        request = codec.decode(body)
    except HostError as exc:
        return type(exc)
    inputs = {name: (array.dtype, array.shape, array.tolist()) for name, array in request.inputs.items()}
    return inputs, request.id, request.outputs, request.binary_output


def tensor(data: Any, shape: list[int], datatype: str = "FP32", name: str = "x", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data, **more}


SHAPES = [[6], [2, 3], [3, 2, 2], [1, 12], [1, 1, 8], [1, 3, 2], [0], [1], [12, 1]]
BODIES: list[Any] = [{"inputs": [tensor(np.arange(np.prod(shape)).reshape(shape).tolist(), shape)]} for shape in SHAPES]
BODIES += [{"inputs": [tensor(np.arange(np.prod(shape)).tolist(), shape, "INT64")]} for shape in SHAPES]
BODIES += [
    {"inputs": [tensor([1, 2], [2]), tensor([3.5] * 9, [3, 3], name="y")], "id": 'a "data":[1,2] b', "outputs": []},
    {"inputs": [tensor(["a", '"data":[', "]"], [3], "BYTES")]},
    {"inputs": [tensor([True, False], [2], "BOOL")]},
    {"inputs": [tensor([1e30, -2.5e-3, 4], [3], "FP64")], "outputs": [{"name": "y"}]},
    {"inputs": [tensor([2**64 - 1, 2**63], [2], "UINT64")]},
    {"inputs": [tensor([1, 2], [2], parameters={"data": [1, 2, 3]})]},
    {"data": [1, 2, 3], "inputs": [tensor([1], [1])]},
    # What is refused, whole or in pieces.
    {"inputs": [tensor([1, 2, 3], [2])]},
    {"inputs": [tensor([1, 2], [3])]},
    {"inputs": [tensor([[1, 2], [3]], [2, 2])]},
    {"inputs": [tensor([[1, 2], [3, 4]], [4])]},
    {"inputs": [tensor([[1, 2, 3, 4]], [2, 2])]},
    {"inputs": [tensor([[[1], [2]], [[3], [4]]], [2, 2])]},
    {"inputs": [tensor([1.5], [1], "INT64")]},
    {"inputs": [tensor([300], [1], "UINT8")]},
    {"inputs": [tensor([1], [1], "BF16")]},
    {"inputs": [tensor([1], [1], "BYTES")]},
    {"inputs": [tensor([1, None], [2])]},
    {"inputs": [tensor([1, "2"], [2])]},
    {"inputs": [tensor([1], [2**62])]},
    {"inputs": [tensor([1], [-1])]},
    {"inputs": [tensor([1], [1], "FP33")]},
    {"inputs": [{"shape": [1], "datatype": "FP32", "data": [1]}]},
    {"inputs": {"data": [1]}},
    {"inputs": []},
    [1, 2],
]


@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("body", BODIES)
def test_in_pieces_as_whole(body: Any, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arrays, or a refusal of the same kind, however the text is spaced."""
    text = json.dumps(body, indent=indent).encode()
    assert outcome(text) == whole(text, monkeypatch)


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1,,2]}]}',
        b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1,2}]}',
        b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1,2]',
        b'{"inputs":[{"name":"x","shape":[2,2],"datatype":"FP32","data":[[1,2],[3,4]}]}',
        b'{"inputs":[{"name":"x","shape":[3],"datatype":"FP32","data":[1.2.3,4-5,e]}]}',
        b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1,2]]}]}',
        b'{"inputs":[{"name":"x","shape":[1,4],"datatype":"FP32","data":[[1,2],[3,4]]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":{"":0}}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":{"":99}}]}',
        b"",
        b"[" * 3000,
    ],
)
def test_broken_text_is_refused(body: bytes) -> None:
    """Never an error of ours, and never other numbers than were sent."""
    with pytest.raises(BadRequest):
        codec.decode(body)


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["data", "", "inputs"]), inner),
        max_leaves=20,
    )
)
def test_any_json_is_taken_or_refused(value: Any) -> None:
    """Whatever is under `data`, the outcome is a request or a refusal, the same as of the text read whole."""
    text = json.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": value}], "also": value})
    with pytest.MonkeyPatch.context() as patch:
        pieces = outcome(text.encode())
        assert pieces == whole(text.encode(), patch)


def test_text_that_is_no_numbers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strings cannot be read in pieces, so that there may not be many of them."""
    monkeypatch.setattr(large_json, "MOST_TEXT", 200)
    with pytest.raises(TooLarge, match="binary"):
        codec.decode(orjson.dumps({"inputs": [tensor(["a" * 300], [1], "BYTES")]}))
    body = orjson.dumps({"inputs": [tensor(list(range(1000)), [1000])]})
    assert codec.decode(body).inputs["x"].sum() == 499500
