"""Reads a large JSON request in pieces, so that others get their turn between them: its number arrays are cut out of
the text unread, what remains is parsed whole, and then each array is parsed some rows at a time into its own memory.

The key `"data"` followed by a colon and a bracket cannot stand inside a JSON string (its quotes would be escaped), so a
search finds every array. Arrays of strings or booleans stay in the remaining text, which is bounded by MOST_TEXT.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import orjson

from weighbridge.engines import datatypes
from weighbridge.hosts import json_keys, tensor_data
from weighbridge.hosts.errors import BadRequest, TooLarge

LARGE = 1 << 18
"""Bytes of JSON from which on it is read in pieces."""
MOST_TEXT = 8 << 20
"""Most bytes of JSON besides its arrays of numbers."""
MOST_ARRAYS = 1024
"""Most arrays of numbers."""
MOST_ROW, MOST_BRACKETS = 16 << 20, 1 << 20
"""Bytes and nested lists of what is parsed at once, for which nested data have no shorter rows."""
_WINDOW = 1 << 20
_PIECE = 1 << 18
_KEY = re.compile(rb'"data"\s*:\s*\[')
_KEY_MARGIN = 64
_OTHER = re.compile(rb"[^0-9eE+\-.,\s\[\]]")
_TAIL = b" \t\r\n,"
_OPENING, _CLOSING = re.compile(rb"\s*\["), re.compile(rb"\]\s*\Z")

Pieces = Generator[None, None, Any]
"""Yields between pieces of work, returns the result."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """An array of numbers in the text: `text[start:end]`, brackets included."""

    start: int
    end: int


def read(text: memoryview) -> Pieces:
    """The request as orjson would parse it, but with arrays of numbers as numpy arrays in their tensors' `data`.

    Raises BadRequest, TooLarge, orjson.JSONDecodeError.
    """
    found = yield from _find(text)
    if len(text) - sum(one.end - one.start for one in found) > MOST_TEXT:
        raise TooLarge(f"JSON of more than {MOST_TEXT} bytes besides its numbers: send the tensors as binary data")
    header = json_keys.read(_without(text, found))
    for tensor in header.get("inputs") or () if isinstance(header, dict) else ():
        if isinstance(tensor, dict) and (marked := _marked(tensor.get("data"), found)) is not None:
            tensor["data"] = (yield from _array(tensor, text, marked)) if _plain(tensor) else []
    return header


def _find(text: memoryview) -> Pieces:
    found: list[Numbers] = []
    at = 0
    while at < len(text):
        window = min(at + _WINDOW + _KEY_MARGIN, len(text))
        key = _KEY.search(text, at, window)
        if key is None:
            at += _WINDOW
        else:
            start = key.end() - 1
            end = yield from _end(text, start)
            if end is not None:
                found.append(Numbers(start, end))
            if len(found) > MOST_ARRAYS:
                raise TooLarge(f"more than {MOST_ARRAYS} arrays of data: a request has fewer tensors")
            at = key.end() if end is None else end
        yield
    return found


def _end(text: memoryview, start: int) -> Pieces:
    """Where the array of numbers ends, behind its last bracket; None when it holds something else."""
    at, other = start, None
    while at < len(text) and other is None:
        other = _OTHER.search(text, at, at + _WINDOW)
        at = other.start() if other is not None else min(at + _WINDOW, len(text))
        yield
    if other is not None and text[at] not in b'"}':
        return None
    tail = bytes(text[max(start, at - 256) : at]).rstrip(_TAIL)
    return max(start, at - 256) + len(tail) if tail.endswith(b"]") else None


def _without(text: memoryview, found: list[Numbers]) -> bytes:
    """The text with a mark in place of each array of numbers."""
    parts, at = [], 0
    for number, one in enumerate(found):
        parts += [bytes(text[at : one.start]), orjson.dumps({"": number})]
        at = one.end
    return b"".join([*parts, bytes(text[at:])])


def _marked(data: Any, found: list[Numbers]) -> Numbers | None:
    number = data.get("") if isinstance(data, dict) and len(data) == 1 else None
    return found[number] if type(number) is int and 0 <= number < len(found) else None


def _plain(tensor: dict[str, Any]) -> bool:
    """Whether it says what it is; one that does not is refused by the codec, in its words."""
    shape = tensor.get("shape")
    said = isinstance(tensor.get("name"), str) and tensor.get("datatype") in datatypes.NAMES
    return said and isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _array(tensor: dict[str, Any], text: memoryview, found: Numbers) -> Pieces:
    """The tensor's numbers, parsed some rows at a time into an array that is made once its size is known to be so."""
    name, datatype, shape = tensor["name"], tensor["datatype"], tensor["shape"]
    if prod(shape) > found.end - found.start:  # before allocating: a shape is only a claim
        raise BadRequest(f"input {name!r}: data of {found.end - found.start} bytes cannot fill shape {shape}")
    inner, depth = _opened(text[found.start : found.end], shape, name)
    row = shape[len(shape) - depth + 1 :] if depth > 1 else []
    flat, at = np.empty(prod(shape), tensor_data.json_dtype(name, datatype)), 0
    for piece in _pieces(inner, depth):
        if len(piece) > MOST_ROW or piece.count(b"[") > MOST_BRACKETS:
            raise TooLarge(
                f"input {name!r}: a row has over {MOST_ROW} bytes or {MOST_BRACKETS} lists: send it flat, or as binary"
            )
        numbers = tensor_data.from_json_rows(name, datatype, row, orjson.loads(piece))
        if at + numbers.size > flat.size:
            raise BadRequest(f"input {name!r}: data of more than {flat.size} values does not fill shape {shape}")
        flat[at : at + numbers.size] = numbers.reshape(-1)
        at += numbers.size
        yield
    if at != flat.size:
        raise BadRequest(f"input {name!r}: data of {at} values does not fill shape {shape}")
    return flat.reshape(shape)


def _opened(region: memoryview, shape: list[int], name: str) -> tuple[memoryview, int]:
    """(what is within the outermost brackets with more than one part, how deep that is nested), 1 for plain numbers."""
    depth = bytes(region[:256]).translate(None, b" \t\r\n").find(bytes(region[:256]).translate(None, b" \t\r\n[")[:1])
    if depth not in (1, len(shape)):
        raise BadRequest(f"input {name!r}: data nested {depth} deep does not fill shape {shape}")
    outermost = len(shape) - depth
    while depth > 1 and shape[outermost] == 1:
        region, depth, outermost = _within(region, name), depth - 1, outermost + 1
    return _within(region, name), depth


def _within(region: memoryview, name: str) -> memoryview:
    opening, closing = _OPENING.match(region), _CLOSING.search(region, max(0, len(region) - 256))
    if opening is None or closing is None:
        raise BadRequest(f"input {name!r}: nested data must be rectangular")
    return region[opening.end() : closing.start()]


def _pieces(inner: memoryview, depth: int) -> Iterator[bytes]:
    """The text in lists of whole parts; between two parts as many brackets close as one has."""
    between = re.compile(rb"\]\s*" * (depth - 1) + rb",")
    at = 0
    while at < len(inner):
        cut = between.search(inner, at + _PIECE)
        end = len(inner) if cut is None else cut.end() - 1
        yield b"[" + bytes(inner[at:end]) + b"]"
        at = end + 1
