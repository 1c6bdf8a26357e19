"""What an `.onnx` file asks for, before any runtime reads it: operators, external data, functions of its own.

A host has onnxruntime, which looks at a file only by loading it, and not the onnx package, whose parse copies every
weight. So this walks the protobuf wire format (protobuf.dev/programming-guides/encoding) along the few fields of
onnx.proto that lead to nodes and tensors; weights are stepped over. What it does not understand, it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from weighbridge.engines.errors import LoadError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEPTH = 16
"""Graphs inside nodes inside graphs; deeper is no model."""

# Message → {field number: what is there}, from onnx.proto; a message's name, or what is noted of the field.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "training", 25: "function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {4: "op_type", 5: "Attribute", 7: "domain"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {8: "name", 13: "external", 14: "location"},
}


@dataclass
class Structure:
    """`operators`: (domain, type), the standard domain as ''. `external`: tensors whose bytes are in other files."""

    operators: set[tuple[str, str]] = field(default_factory=set)
    external: list[str] = field(default_factory=list)
    functions: bool = False
    training: bool = False


def structure(data: bytes) -> Structure:
    """Walk a serialised ModelProto. Raises LoadError when it is none."""
    found = Structure()
    try:
        _walk("Model", memoryview(data), found, 0)
    except (IndexError, UnicodeDecodeError, ValueError) as exc:
        raise LoadError(f"not a readable ONNX file: {exc}") from exc
    if not found.operators:
        raise LoadError("not a readable ONNX file: it has no operators")
    return found


def _walk(message: str, data: memoryview, found: Structure, depth: int) -> None:
    if depth > _DEPTH:
        raise ValueError(f"messages lie more than {_DEPTH} deep")
    said: dict[str, str] = {}
    for number, value in _fields(data):
        what = _FIELDS[message].get(number)
        if what in _FIELDS and isinstance(value, memoryview):
            _walk(what, value, found, depth + 1)
        elif what in ("training", "function"):
            found.training |= what == "training"
            found.functions |= what == "function"
        elif what == "location":
            said |= {"external": ""} if value else {}
        elif what is not None and isinstance(value, memoryview):
            said[what] = "" if what == "external" else str(value, "utf-8")
        elif what is not None:
            raise ValueError(f"field {number} of {message} is no {what}")
    if message == "Node":
        domain = said.get("domain", "")
        found.operators.add(("" if domain == "ai.onnx" else domain, said.get("op_type", "")))
    if "external" in said:
        found.external.append(said.get("name", ""))


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, bytes or number) of one message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """(number, next position)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")
