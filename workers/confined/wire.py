"""What passes between a confined child and its worker: frames of a head and a body, over a socket pair.

The worker's heads are pickled: it is trusted, and the child may be told anything. The child's are JSON: it has read
what strangers wrote, and nobody unpickles what it says.
"""

from __future__ import annotations

import json
import pickle
import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

_LENGTHS = struct.Struct("<IQ")
MOST = 256 << 20
"""Bytes of one frame that a worker takes from its child."""
_PART = 1 << 20


class BadFrame(ValueError):
    """A child said what no child of ours says."""


class Said(NamedTuple):
    """One word of the child: what it asks or answers, and bytes with it."""

    head: dict[str, Any]
    body: bytes


def say(sock: socket.socket, head: dict[str, Any], body: bytes = b"") -> None:
    """The child's: one frame as JSON. Raises OSError when the worker is gone."""
    _send(sock, json.dumps(head, separators=(",", ":")).encode(), body)


def tell(sock: socket.socket, value: object, body: bytes = b"") -> None:
    """The worker's: one frame, pickled. Raises EOFError when the child is gone, TimeoutError when it does not read."""
    try:
        _send(sock, pickle.dumps(value, pickle.HIGHEST_PROTOCOL), body)
    except (BrokenPipeError, ConnectionResetError) as exc:
        raise EOFError("the child is gone") from exc


def receive(sock: socket.socket) -> bytes:
    """The worker's: what has come. Raises EOFError when the child is gone."""
    try:
        data = sock.recv(_PART)
    except ConnectionResetError:
        data = b""
    if not data:
        raise EOFError("the child is gone")
    return data


def hear(sock: socket.socket) -> tuple[Any, bytes]:
    """The child's: wait for one frame of the worker. Raises EOFError when it is gone."""
    head, body = _LENGTHS.unpack(_exactly(sock, _LENGTHS.size))
    value = pickle.loads(_exactly(sock, head))  # noqa: S301  # the worker's own words
    return value, bytes(_exactly(sock, body))


class Listener:
    """The worker's ear: takes bytes as they come, and gives frames when they are whole."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Said]:
        """Raises BadFrame for one that is too long, or no JSON object."""
        self._held += data
        while len(self._held) >= _LENGTHS.size:
            head, body = _LENGTHS.unpack_from(self._held)
            if head + body > MOST:
                raise BadFrame(f"a frame of {head + body:,} bytes, at most {MOST:,} are taken")
            end = _LENGTHS.size + head + body
            if len(self._held) < end:
                return
            text, rest = bytes(self._held[_LENGTHS.size : end - body]), bytes(self._held[end - body : end])
            del self._held[:end]
            yield Said(_object(text), rest)


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadFrame(f"no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise BadFrame("no JSON object")
    return value


def _send(sock: socket.socket, head: bytes, body: bytes) -> None:
    sock.sendall(_LENGTHS.pack(len(head), len(body)) + head)
    if body:
        sock.sendall(body)


def _exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = sock.recv_into(view[:_PART])
        if not got:
            raise EOFError("the worker is gone")
        view = view[got:]
    return data
