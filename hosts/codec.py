"""The Open Inference Protocol v2 over HTTP: bodies to arrays, arrays to bodies. Pure; no sockets, no model."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import orjson

from weighbridge.engines import datatypes
from weighbridge.engines.protocols import Array
from weighbridge.hosts import json_keys, large_json, tensor_data
from weighbridge.hosts.errors import BadRequest, OutsideContract, TooLarge

T = TypeVar("T")

MAX_RANK = 32
MOST_TENSORS = 1024
"""Inputs, or wanted outputs, of one request: each costs more than its bytes say."""
_BEYOND = 1 << 63
"""No size or number of bytes is as large."""
_NUMBERS = 1 << 15
"""Numbers of an answer that are written at once."""


@dataclass(slots=True)
class InferRequest:
    """A decoded request. `outputs` maps each wanted name to its own `binary_data`; None wants all of them."""

    inputs: dict[str, Array]
    id: str | None = None
    outputs: dict[str, bool | None] | None = None
    binary_output: bool = False


@dataclass(slots=True)
class Encoded:
    """A response body in parts; `header_length` is the JSON's byte count when binary data follows, else None."""

    parts: list[bytes | memoryview] = field(default_factory=list)
    header_length: int | None = None


def finished(pieces: Generator[None, None, T]) -> T:
    """The result of work that yields between its pieces."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return cast("T", end.value)


def decode(body: bytes | bytearray | memoryview, header_length: int | None = None) -> InferRequest:
    """A request from its plain body; without `header_length` all of it is JSON. Raises BadRequest, TooLarge."""
    return finished(decoding(body, header_length))


def decoding(
    body: bytes | bytearray | memoryview, header_length: int | None = None
) -> Generator[None, None, InferRequest]:
    """`decode` that yields between the pieces of a large JSON."""
    view = memoryview(body)
    if header_length is not None and not 0 <= header_length <= view.nbytes:
        raise BadRequest(f"Inference-Header-Content-Length {header_length} exceeds the body's {view.nbytes} bytes")
    text = view if header_length is None else view[:header_length]
    try:
        header = (yield from large_json.read(text)) if len(text) >= large_json.LARGE else json_keys.read(bytes(text))
    except orjson.JSONDecodeError as exc:
        raise BadRequest(f"the request is no JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise BadRequest("the request must be a JSON object")
    request = InferRequest(_inputs(header.get("inputs"), view[len(text) :]))
    if (request_id := header.get("id")) is not None:
        if not isinstance(request_id, str):
            raise BadRequest("id must be a string")
        request.id = request_id
    request.binary_output = _flag(_parameters(header, "the request"), "binary_data_output") or False
    if header.get("outputs"):
        request.outputs = _wanted(header["outputs"])
    return request


def encode(model: str, version: str, request: InferRequest, outputs: Mapping[str, Array]) -> Encoded:
    """The response body for `outputs`. Raises OutsideContract for a wanted output that the model does not have."""
    return finished(encoding(model, version, request, outputs))


def encoding(
    model: str, version: str, request: InferRequest, outputs: Mapping[str, Array]
) -> Generator[None, None, Encoded]:
    """`encode` that yields between the pieces of a large answer."""
    wanted = request.outputs or dict.fromkeys(outputs)
    if missing := [name for name in wanted if name not in outputs]:
        raise OutsideContract(f"output {missing[0]!r} is none of the model's: {', '.join(outputs)}")
    binary = {name: request.binary_output if own is None else own for name, own in wanted.items()}
    described, blobs = _describe({name: outputs[name] for name in wanted}, binary)
    for tensor in described:
        if isinstance(data := tensor.get("data"), np.ndarray) and data.size > _NUMBERS:
            tensor["data"] = yield from _written(data)
    head: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        head["id"] = request.id
    return _encoded(head, blobs)


def _written(flat: Array) -> Generator[None, None, orjson.Fragment]:
    parts = []
    for start in range(0, flat.size, _NUMBERS):
        parts.append(orjson.dumps(flat[start : start + _NUMBERS], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1])
        yield
    return orjson.Fragment(b"[" + b",".join(parts) + b"]")


def encode_request(inputs: Mapping[str, Array]) -> Encoded:
    """A request body for `inputs`: JSON where JSON can carry the tensor, binary data where it cannot."""
    binary = {name: not tensor_data.fits_json(array) for name, array in inputs.items()}
    described, blobs = _describe(inputs, binary)
    return _encoded({"inputs": described}, blobs)


def _describe(
    arrays: Mapping[str, Array], binary: Mapping[str, bool]
) -> tuple[list[dict[str, Any]], list[bytes | memoryview]]:
    described: list[dict[str, Any]] = []
    blobs: list[bytes | memoryview] = []
    for name, array in arrays.items():
        tensor: dict[str, Any] = {"name": name, "datatype": tensor_data.datatype_of(array), "shape": array.shape}
        if binary[name]:
            blob = tensor_data.to_binary(array)
            tensor["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            tensor["data"] = tensor_data.to_json(name, array)
        described.append(tensor)
    return described, blobs


def _encoded(head: dict[str, Any], blobs: list[bytes | memoryview]) -> Encoded:
    text = orjson.dumps(head, option=orjson.OPT_SERIALIZE_NUMPY)
    return Encoded([text, *blobs], len(text) if blobs else None)


def encode_error(message: str) -> bytes:
    """The only form of error that the protocol's clients decode."""
    return orjson.dumps({"error": message})


def _inputs(listed: Any, blobs: memoryview) -> dict[str, Array]:
    if not isinstance(listed, list) or not listed:
        raise BadRequest("inputs must be a list of at least one tensor")
    if len(listed) > MOST_TENSORS:
        raise TooLarge(f"{len(listed)} inputs: a request has at most {MOST_TENSORS}")
    inputs: dict[str, Array] = {}
    at = 0
    for tensor in listed:
        name, datatype, shape = _described(tensor)
        if name in inputs:
            raise BadRequest(f"input {name!r} is given twice")
        size = _parameters(tensor, f"input {name!r}").get("binary_data_size")
        if size is None:
            inputs[name] = _json_input(name, datatype, shape, tensor)
            continue
        if not _natural(size) or at + size > blobs.nbytes:
            raise BadRequest(f"input {name!r}: binary_data_size {size} exceeds the bytes that follow the JSON")
        if "data" in tensor:
            raise BadRequest(f"input {name!r} has both data and binary_data_size")
        inputs[name] = tensor_data.from_binary(name, datatype, shape, blobs[at : at + size])
        at += size
    if at != blobs.nbytes:
        raise BadRequest(f"{blobs.nbytes - at} bytes follow the last binary input")
    return inputs


def _described(tensor: Any) -> tuple[str, str, list[int]]:
    if not isinstance(tensor, dict) or not isinstance(name := tensor.get("name"), str):
        raise BadRequest("each input must be an object with a name")
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if not isinstance(datatype, str) or datatype not in datatypes.NAMES:
        raise BadRequest(f"input {name!r}: datatype must be one of {', '.join(datatypes.NAMES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_natural(size) for size in shape):
        raise BadRequest(f"input {name!r}: shape must be a list of at most {MAX_RANK} sizes, each 0 or more")
    return name, datatype, shape


def _json_input(name: str, datatype: str, shape: list[int], tensor: dict[str, Any]) -> Array:
    if "shared_memory_region" in (tensor.get("parameters") or {}):
        raise BadRequest(f"input {name!r}: shared memory is not supported; send the data")
    if isinstance(data := tensor.get("data"), np.ndarray):  # large_json has read it
        return data
    if not isinstance(data, list):
        raise BadRequest(f"input {name!r} needs data (a list) or parameters.binary_data_size")
    return tensor_data.from_json(name, datatype, shape, data)


def _wanted(listed: Any) -> dict[str, bool | None]:
    if not isinstance(listed, list):
        raise BadRequest("outputs must be a list")
    if len(listed) > MOST_TENSORS:
        raise TooLarge(f"{len(listed)} outputs are wanted: a request has at most {MOST_TENSORS}")
    wanted: dict[str, bool | None] = {}
    for output in listed:
        if not isinstance(output, dict) or not isinstance(name := output.get("name"), str):
            raise BadRequest("each output must be an object with a name")
        parameters = _parameters(output, f"output {name!r}")
        if unsupported := {"classification", "shared_memory_region"} & parameters.keys():
            raise BadRequest(f"output {name!r}: {unsupported.pop()} is not supported")
        wanted[name] = _flag(parameters, "binary_data")
    return wanted


def _parameters(holder: dict[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(parameters := holder.get("parameters") or {}, dict):
        raise BadRequest(f"{what}: parameters must be an object")
    return parameters


def _flag(parameters: dict[str, Any], name: str) -> bool | None:
    if not isinstance(value := parameters.get(name), bool | None):
        raise BadRequest(f"parameters.{name} must be true or false")
    return value


def _natural(size: Any) -> bool:
    return type(size) is int and 0 <= size < _BEYOND
