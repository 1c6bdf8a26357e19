"""The Open Inference Protocol's bodies."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weighbridge.engines import datatypes
from weighbridge.hosts import codec
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


def test_bodies_are_decompressed_up_to_a_cap() -> None:
    """gzip and deflate are undone; a bomb, a torso and an unknown coding are refused."""
    plain = b"x" * 1000
    assert codec.decompress(plain, "", 10) == plain
    assert codec.decompress(gzip.compress(plain), "gzip", 1000) == plain
    assert codec.decompress(zlib.compress(plain), "deflate", 1000) == plain
    with pytest.raises(TooLarge):
        codec.decompress(gzip.compress(bytes(10**7)), "gzip", 1000)
    with pytest.raises(BadRequest, match="cut short"):
        codec.decompress(gzip.compress(plain)[:-4], "gzip", 1000)
    with pytest.raises(BadRequest, match="no gzip"):
        codec.decompress(b"plain", "gzip", 1000)
    with pytest.raises(UnsupportedEncoding):
        codec.decompress(plain, "br", 1000)
