"""A tensor's data on the wire of the Open Inference Protocol: JSON lists and little-endian bytes, to and from numpy."""

from __future__ import annotations

import struct
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from weighbridge.engines import datatypes
from weighbridge.engines.protocols import Array
from weighbridge.hosts.errors import BadRequest, HostError, TooLarge

_JSON_KINDS = {"b": "b", "u": "ui", "i": "ui", "f": "fui"}
"""Which kinds of JSON numbers a datatype's kind admits: a float never becomes an integer by truncation."""
_LENGTH = struct.Struct("<I")
MOST_STRINGS = 1 << 20
"""BYTES elements of one tensor: each is an object of its own."""
_NO_BF16 = "input {0!r}: BF16 travels as binary data only"


def datatype_of(array: Array) -> str:
    """The protocol's name of an array's dtype. Raises HostError for one that the protocol does not have."""
    try:
        return datatypes.from_numpy(array.dtype)
    except KeyError:
        raise HostError(f"the engine answered dtype {array.dtype}, which the protocol does not have") from None


def from_json(name: str, datatype: str, shape: list[int], data: Any) -> Array:
    """A tensor of `shape` from a flat or nested list. Raises BadRequest naming the tensor and the rule."""
    if datatype == "BF16":
        raise BadRequest(_NO_BF16.format(name))
    array = _bytes_list(name, data) if datatype == "BYTES" else _number_list(name, datatype, data)
    if array.size != prod(shape) or (array.ndim > 1 and array.shape != tuple(shape)):
        raise BadRequest(f"input {name!r}: data of shape {list(array.shape)} does not fill shape {shape}")
    return _shaped(name, array, shape)


def json_dtype(name: str, datatype: str) -> np.dtype[Any]:
    """The dtype of an input whose JSON data are numbers. Raises BadRequest where they cannot be."""
    if datatype == "BF16":
        raise BadRequest(_NO_BF16.format(name))
    if datatype == "BYTES":
        raise BadRequest(f"input {name!r}: BYTES data must be strings")
    return datatypes.to_numpy(datatype)


def from_json_rows(name: str, datatype: str, row: list[int], data: Any) -> Array:
    """Some rows of a tensor, each of shape `row`, from a list. Raises BadRequest naming the tensor and the rule."""
    array = _number_list(name, datatype, data)
    if array.shape[1:] != tuple(row):
        raise BadRequest(f"input {name!r}: data of shape {list(array.shape)} where rows of shape {row} are said to be")
    return array


def _shaped(name: str, array: Array, shape: list[int]) -> Array:
    try:
        return array.reshape(shape)
    except ValueError as exc:  # an empty tensor whose other sizes overflow numpy's index
        raise BadRequest(f"input {name!r}: shape {shape} is impossible") from exc


def _number_list(name: str, datatype: str, data: Any) -> Array:
    dtype = datatypes.to_numpy(datatype)
    try:
        array = np.array(data)
    except ValueError:
        raise BadRequest(f"input {name!r}: nested data must be rectangular") from None
    if array.size == 0:
        return array.astype(dtype)
    if dtype.kind in "ui" and array.dtype.kind == "f":
        array = _exact(array, data)
    if array.dtype.kind not in _JSON_KINDS[dtype.kind]:
        raise BadRequest(f"input {name!r}: data holds values that are no {datatype}")
    try:
        with np.errstate(over="raise"):
            cast = array.astype(dtype)
    except FloatingPointError:
        raise BadRequest(f"input {name!r}: a value does not fit into {datatype}") from None
    if dtype.kind in "ui" and not np.array_equal(cast, array):
        raise BadRequest(f"input {name!r}: a value does not fit into {datatype}")
    return cast


def _exact(array: Array, data: Any) -> Array:
    """numpy makes floats of integers on both sides of 2**63; as uint64 they are exact, if none is negative."""
    exact = np.array(data, dtype=object)
    whole = all(type(value) is int and 0 <= value < 2**64 for value in exact.flat)
    return exact.astype(np.uint64) if whole else array


def _bytes_list(name: str, data: Any) -> Array:
    shape: list[int] = []
    level = data
    while isinstance(level, list) and level and isinstance(level[0], list):
        shape.append(len(level))
        if any(not isinstance(row, list) or len(row) != len(level[0]) for row in level):
            raise BadRequest(f"input {name!r}: nested data must be rectangular")
        level = [item for row in level for item in row]
        data = level
    if any(not isinstance(item, str) for item in data):
        raise BadRequest(f"input {name!r}: BYTES data must be strings")
    array = np.empty(len(data), dtype=object)
    array[:] = [item.encode() for item in data]
    return array


def from_binary(name: str, datatype: str, shape: list[int], raw: memoryview) -> Array:
    """A tensor of `shape` over the bytes of `raw`, not copied where they are aligned. Raises BadRequest."""
    if datatype == "BYTES":
        return _shaped(name, _bytes_blob(name, raw, prod(shape)), shape)
    dtype = datatypes.to_numpy(datatype)
    if raw.nbytes != prod(shape) * dtype.itemsize:
        raise BadRequest(
            f"input {name!r}: {datatype} of shape {shape} is {prod(shape) * dtype.itemsize} bytes, not {raw.nbytes}"
        )
    array = _shaped(name, np.frombuffer(raw, dtype=dtype), shape)
    return array if array.flags.aligned else array.copy()


def _bytes_blob(name: str, raw: memoryview, count: int) -> Array:
    if count * _LENGTH.size > raw.nbytes:  # before allocating: a shape is only a claim
        raise BadRequest(f"input {name!r}: {raw.nbytes} bytes cannot hold {count} BYTES elements")
    if count > MOST_STRINGS:
        raise TooLarge(f"input {name!r}: {count} BYTES elements, at most {MOST_STRINGS} are taken at once")
    array, at = np.empty(count, dtype=object), 0
    for index in range(count):
        start = at + _LENGTH.size
        length = _LENGTH.unpack_from(raw, at)[0] if start <= raw.nbytes else raw.nbytes
        at = start + length
        if at > raw.nbytes:
            raise BadRequest(f"input {name!r}: BYTES element {index} reaches past its data")
        array[index] = bytes(raw[start:at])
    if at != raw.nbytes:
        raise BadRequest(f"input {name!r}: {raw.nbytes - at} bytes follow the last BYTES element")
    return array


def fits_json(array: Array) -> bool:
    """Whether a request can carry the tensor as JSON data."""
    return array.dtype.kind in "biu" or (array.dtype.kind == "f" and bool(np.isfinite(array).all()))


def to_json(name: str, array: Array) -> Any:
    """What orjson writes for a tensor: flat, row-major. Raises HostError for what JSON cannot carry."""
    flat = np.ascontiguousarray(array).reshape(-1)
    kind = flat.dtype.kind
    if flat.dtype == ml_dtypes.bfloat16:
        return to_json(name, flat.astype(np.float32))
    if kind == "f" and not np.isfinite(flat).all():
        raise HostError(f"output {name!r} holds NaN or infinity, which JSON cannot carry; ask for binary_data")
    if kind != "O":
        return flat
    try:
        return [item if isinstance(item, str) else bytes(item).decode() for item in flat]
    except UnicodeDecodeError:
        raise HostError(f"output {name!r} holds bytes that are no UTF-8; ask for binary_data") from None


def to_binary(array: Array) -> bytes | memoryview:
    """A tensor's little-endian bytes, row-major; not copied where they lie so already."""
    if array.dtype.kind != "O":
        flat = np.ascontiguousarray(array).reshape(-1)
        return flat.view(np.uint8).data
    items = [item.encode() if isinstance(item, str) else bytes(item) for item in array.reshape(-1)]
    return b"".join(part for item in items for part in (_LENGTH.pack(len(item)), item))
