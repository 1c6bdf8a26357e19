"""The Open Inference Protocol's bodies."""

from __future__ import annotations

import gzip
import json
import struct
import tracemalloc
import zlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weighbridge.engines import datatypes
from weighbridge.hosts import codec, inflate, large_json
from weighbridge.hosts.errors import BadRequest, HostError, TooLarge, UnsupportedEncoding

NUMBERS = [name for name in datatypes.NAMES if name != "BYTES"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def tensor(datatype: str = "FP32", shape: Any = (2,), **more: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": list(shape), **more}


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    datatype = draw(st.sampled_from(datatypes.NAMES))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        return draw(hnp.arrays(object, shape, elements=st.binary(max_size=20), fill=st.nothing()))
    if datatype == "BF16":
        return draw(hnp.arrays(np.float32, shape)).astype(ml_dtypes.bfloat16)
    return draw(hnp.arrays(datatypes.to_numpy(datatype), shape))


def as_request(response: codec.Encoded) -> bytes:
    """An encoded response's outputs, turned into a request's inputs."""
    text = bytes(response.parts[0]).replace(b'"outputs":', b'"inputs":', 1)
    return text + b"".join(response.parts[1:]), len(text)  # type: ignore[return-value]


@settings(deadline=None)
@given(arrays(), st.data())
def test_any_tensor_survives_binary_encoding(array: Any, data: st.DataObject) -> None:
    """What is encoded as binary data decodes to the same dtype, shape and bits."""
    request = codec.InferRequest({}, binary_output=True)
    raw, length = as_request(codec.encode("m", "1", request, {"x": array}))
    seen = codec.decode(bytearray(raw), length).inputs["x"]
    assert seen.dtype == array.dtype
    assert seen.shape == array.shape
    assert seen.tobytes() == array.tobytes() if array.dtype.kind != "O" else seen.tolist() == array.tolist()


@settings(deadline=None)
@given(arrays())
def test_what_json_can_carry_survives_json(array: Any) -> None:
    """A request built from arrays decodes to equal ones: JSON where it fits, binary data where it does not."""
    encoded = codec.encode_request({"x": array})
    seen = codec.decode(bytearray(b"".join(encoded.parts)), encoded.header_length).inputs["x"]
    assert seen.dtype == array.dtype
    assert seen.shape == array.shape
    if array.dtype.kind == "O":
        assert seen.tolist() == array.tolist()
    else:
        np.testing.assert_array_equal(seen.astype(np.float64), array.astype(np.float64))


@settings(deadline=None)
@given(st.binary(max_size=200), st.none() | st.integers(-5, 300))
def test_arbitrary_bytes_are_refused_as_a_bad_request(raw: bytes, length: int | None) -> None:
    """Nothing but BadRequest comes out of garbage."""
    with pytest.raises(BadRequest):
        codec.decode(raw, length)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.sampled_from(datatypes.NAMES), json_values, json_values, json_values)
def test_hostile_json_is_decoded_or_refused(datatype: str, shape: Any, data: Any, parameters: Any) -> None:
    """Any JSON in any field either decodes or is a BadRequest; never another exception."""
    raw = body({"name": "x", "datatype": datatype, "shape": shape, "data": data, "parameters": parameters})
    try:
        codec.decode(raw)
    except BadRequest:
        return


@pytest.mark.parametrize("nested", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
def test_data_may_be_flat_or_nested(nested: Any) -> None:
    """Both forms are row-major."""
    seen = codec.decode(body(tensor("INT64", (2, 3), data=nested))).inputs["x"]
    assert seen.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_bytes_come_as_strings_in_json_and_length_prefixed_in_binary() -> None:
    """BYTES in JSON are strings; in binary a uint32 length precedes each element."""
    seen = codec.decode(body(tensor("BYTES", (1, 2), data=[["é", ""]]))).inputs["x"]
    assert seen.tolist() == [["é".encode(), b""]]
    blob = struct.pack("<I", 3) + b"\xff\x00a" + struct.pack("<I", 0)
    text = body(tensor("BYTES", parameters={"binary_data_size": len(blob)}))
    assert codec.decode(text + blob, len(text)).inputs["x"].tolist() == [b"\xff\x00a", b""]


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (b"", "no JSON"),
        (b"[]", "JSON object"),
        (b"{}", "at least one"),
        (body(tensor(data=[1])), "does not fill"),
        (body(tensor(shape=(-2,), data=[1, 2])), "each 0 or more"),
        (body(tensor(shape=(2**40, 0, 2**40), data=[])), "impossible"),
        (body(tensor(shape=(1, 2), data=[[1], [2]])), "does not fill"),
        (body(tensor(data=[[1], [2, 3]])), "rectangular"),
        (body(tensor(data=["1", "2"])), "no FP32"),
        (body(tensor(data=[1, None])), "no FP32"),
        (body(tensor(data=[1e300, 0])), "does not fit"),
        (body(tensor("INT8", data=[1, 300])), "does not fit"),
        (body(tensor("UINT8", data=[1, -1])), "does not fit"),
        (body(tensor("INT32", data=[1.5, 2])), "no INT32"),
        (body(tensor("BOOL", data=[2, 1])), "no BOOL"),
        (body(tensor("BF16", data=[1, 2])), "binary data only"),
        (body(tensor("BYTES", data=[1, 2])), "must be strings"),
        (body(tensor("FP8", data=[1, 2])), "datatype must be one of"),
        (body(tensor()), "needs data"),
        (body(tensor(parameters={"binary_data_size": 8})), "exceeds the bytes"),
        (body(tensor(data=[1, 2]), tensor(data=[1, 2])), "twice"),
        (body(tensor(parameters={"shared_memory_region": "r"})), "shared memory"),
        (body(tensor(data=[1, 2]), id=7), "id must be"),
        (body(tensor(data=[1, 2]), parameters={"binary_data_output": 1}), "true or false"),
        (body(tensor(data=[1, 2]), outputs=[{"name": "y", "parameters": {"classification": 3}}]), "not supported"),
    ],
)
def test_a_request_that_breaks_the_protocol_is_refused_with_the_rule(given: bytes, rule: str) -> None:
    """The message names what is wrong; nothing is truncated, wrapped or guessed."""
    with pytest.raises(BadRequest, match=rule):
        codec.decode(given)


def test_binary_sizes_must_add_up() -> None:
    """A wrong size, trailing bytes and a header longer than the body are refused."""
    text = body(tensor(parameters={"binary_data_size": 8}))
    assert codec.decode(text + bytes(8), len(text)).inputs["x"].tolist() == [0, 0]
    for raw, length in [(text + bytes(9), len(text)), (text + bytes(7), len(text)), (text, len(text) + 1)]:
        with pytest.raises(BadRequest):
            codec.decode(raw, length)
    text = body(tensor("BYTES", shape=(2**50,), parameters={"binary_data_size": 8}))
    with pytest.raises(BadRequest, match="cannot hold"):
        codec.decode(text + bytes(8), len(text))


def test_outputs_are_selected_and_each_may_choose_its_form() -> None:
    """`outputs` selects and orders; a per-output binary_data overrides binary_data_output."""
    wanted = [{"name": "b", "parameters": {"binary_data": False}}, {"name": "a"}]
    request = codec.decode(body(tensor(data=[1, 2]), id="7", outputs=wanted, parameters={"binary_data_output": True}))
    outputs = {name: np.float32([1.5]) for name in "abc"}
    encoded = codec.encode("m", "3", request, outputs)
    head = json.loads(bytes(encoded.parts[0]))
    assert (head["model_name"], head["model_version"], head["id"]) == ("m", "3", "7")
    assert [output["name"] for output in head["outputs"]] == ["b", "a"]
    assert head["outputs"][0]["data"] == [1.5]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 4}
    assert encoded.header_length == len(encoded.parts[0])
    with pytest.raises(BadRequest, match="none of the model's"):
        codec.encode("m", "3", request, {"a": outputs["a"]})


def test_json_outputs_need_no_header_length() -> None:
    """Inference-Header-Content-Length is omitted when all outputs are JSON; BF16 then widens."""
    encoded = codec.encode("m", "1", codec.InferRequest({}), {"y": np.array([1.5], ml_dtypes.bfloat16)})
    assert encoded.header_length is None
    assert json.loads(bytes(encoded.parts[0]))["outputs"][0]["data"] == [1.5]


@pytest.mark.parametrize("array", [np.float32([np.nan]), np.array([b"\xff"], object), np.complex64([1])])
def test_an_output_that_json_cannot_carry_is_an_error_and_never_null(array: Any) -> None:
    """NaN and raw bytes need binary data; a dtype outside the protocol needs another model."""
    with pytest.raises(HostError):
        codec.encode("m", "1", codec.InferRequest({}), {"y": array})


def unpacked(body: bytes, coding: str, most: int = 1 << 30, ratio: int = 100) -> bytes:
    return b"".join(inflate.pieces(body, inflate.coding(coding), most, ratio))


def test_bodies_are_unpacked_within_their_budget() -> None:
    """gzip and deflate are undone; a torso and other bytes are refused."""
    plain = b"x" * 1000
    assert unpacked(gzip.compress(plain), "gzip", 1000) == plain
    assert unpacked(zlib.compress(plain), "Deflate, identity", 1000) == plain
    assert inflate.coding(" , identity") == ""
    with pytest.raises(BadRequest, match="cut short"):
        unpacked(gzip.compress(plain)[:-4], "gzip")
    with pytest.raises(BadRequest, match="no gzip"):
        unpacked(b"plain", "gzip")


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "gzip, deflate", "gzip;q=1", "zstd, gzip", "x" * 5000])
def test_what_is_not_one_known_coding_is_not_undone(encoding: str) -> None:
    """Codings over codings multiply what a byte can become."""
    with pytest.raises(UnsupportedEncoding) as told:
        inflate.coding(encoding)
    assert len(str(told.value)) < 200


def test_a_bomb_ends_where_its_budget_does() -> None:
    """Over 1 MiB a body may unpack to a multiple of its size; no more than one piece beyond is ever made."""
    bomb, seen = gzip.compress(bytes(64 << 20)), 0
    pieces = inflate.pieces(bomb, "gzip", 1 << 30, 100)

    def feed() -> None:
        nonlocal seen
        for piece in pieces:
            assert len(piece) <= inflate.UNPACKED_AT_ONCE
            seen += len(piece)

    with pytest.raises(TooLarge, match="max_inflation"):
        feed()
    assert seen <= max(inflate.FREE, 100 * len(bomb))
    assert len(unpacked(gzip.compress(bytes(inflate.FREE)), "gzip")) == inflate.FREE
    with pytest.raises(TooLarge):
        unpacked(gzip.compress(bytes(inflate.FREE)), "gzip", most=1000)


TWICE = [
    b'{"inputs":[%s],"inputs":[%s]}',
    b'{"inputs":[%s],"inp\\u0075ts":[%s]}',
    b'{"id":"a:b","inputs":[%s],"parameters":{"a":{"b":1,"b":[%s]}}}',
    b'{"inputs":[%s],"parameters":{"x":[[{"k":1,"k":[%s]}]]}}',
    b'{"id":"\\":","inputs":[%s],"outputs":[],"outputs" : [%s]}',
]


@pytest.mark.parametrize("text", TWICE)
def test_a_key_that_is_said_twice_is_refused(text: bytes) -> None:
    """Readers differ in which of the two they take; however it is spelled, and wherever it is."""
    one = json.dumps(tensor(data=[1, 2])).encode()
    with pytest.raises(BadRequest, match="twice"):
        codec.decode(text.replace(b"\\\\", b"\\") % (one, one))


def test_a_tensor_that_says_twice_what_it_is() -> None:
    """Small or large, flat or binary."""
    for more in (b'"shape":[2],', b'"data":[1,2],', b'"datatype":"FP64",', b'"name":"y",'):
        text = b'{"inputs":[{"name":"x",' + more + b'"shape":[2],"datatype":"FP32","data":[3,4]}]}'
        for padding in (b"", b" " * large_json.LARGE):
            with pytest.raises(BadRequest, match="twice"):
                codec.decode(text + padding)


@pytest.mark.parametrize("name", ["a:b", 'a":', ':"', "\\", '\\":', "é:", "a\nb:"])
def test_colons_and_quotes_in_strings_are_no_keys(name: str) -> None:
    """Names, ids and strings may hold what looks like one."""
    raw = body({**tensor("BYTES", data=[name, name]), "name": name}, id=name, parameters={name: {name: name}})
    assert codec.decode(raw).inputs[name].tolist() == [name.encode()] * 2


FP32 = b'{"inputs":[{"name":"x","datatype":"FP32",'
BOMBS = {
    "lists": b'{"inputs":[' + b"[]," * (2 << 20) + b"[]]}",
    "objects": b'{"inputs":[' + b"{}," * (2 << 20) + b"{}]}",
    "strings": b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["a"' + b',"a"' * (1 << 20) + b"]}]}",
    "tensors": b'{"inputs":[' + b",".join([json.dumps(tensor(data=[1, 2])).encode()] * 50_000) + b"]}",
    "arrays": b'{"inputs":[' + b",".join([b'{"data":[]}'] * 400_000) + b"]}",
    "deep": b'{"inputs":' + b"[" * 900_000 + b"]" * 900_000 + b"}",
    "a deep array": FP32 + b'"shape":[1],"data":' + b"[" * 10**6 + b"1" + b"]" * 10**6 + b"}]}",
    "empty rows": FP32 + b'"shape":[1,1,1],"data":[[[1]]' + b",[]" * (4 << 20) + b"]}]}",
    "wanted": body(tensor(data=[1, 2]), outputs=[{"name": str(number)} for number in range(20_000)]),
    "one number": body(tensor(data=[1, 2])).replace(b"[1, 2]", b"[" + b"7" * (5 << 20) + b"]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_what_takes_much_more_than_its_bytes_is_refused_soon(kind: str) -> None:
    """A client's fault, found before much is made of it: ten times the body's size is never taken."""
    raw = BOMBS[kind]
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest):
            codec.decode(raw)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(raw) + (64 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "number", [b"1" * 5000, b"-" + b"9" * 5000, b"1e5000", b"1" * 5000 + b"e-4990", b"NaN", b"-Infinity"]
)
@pytest.mark.parametrize(
    "field", [b'"data":[%s,1]', b'"data":[1,1],"x":%s', b'"data":[1,1],"parameters":{"binary_data_size":%s}']
)
@pytest.mark.parametrize("padding", [b"", b" " * large_json.LARGE])
def test_numbers_of_thousands_of_digits(number: bytes, field: bytes, padding: bytes) -> None:
    """A refusal, not an error of ours, wherever they are."""
    text = b'{"inputs":[{"name":"x","shape":[2],"datatype":"FP32",' + field % number + b"}]}"
    try:
        seen = codec.decode(text + padding)
    except BadRequest:
        return
    assert number.endswith(b"e-4990")  # ten digits before the point: a number like any other
    assert np.isfinite(seen.inputs["x"]).all()


def test_binary_tensors_cannot_lie_over_each_other() -> None:
    """Each begins where the one before ends; their sum is what follows the JSON, exactly."""

    def named(name: str, size: Any) -> dict[str, Any]:
        return {**tensor(shape=[1], parameters={"binary_data_size": size}), "name": name}

    for sizes in [
        (4, 8),
        (8, 4),
        (-4, 12),
        (0, 8),
        (2**63, 4),
        (4, 2**64 - 4),
        (4, True),
        (4, None),
        (4, "4"),
        (4, 4.0),
    ]:
        text = body(named("x", sizes[0]), named("y", sizes[1]))
        with pytest.raises(BadRequest):
            codec.decode(text + bytes(8), len(text))
    text = body(tensor("BYTES", shape=[2 << 20], parameters={"binary_data_size": 8 << 20}))
    with pytest.raises(TooLarge, match="BYTES elements"):
        codec.decode(text + bytes(8 << 20), len(text))
