"""The wire between the front and an engine child: length-prefixed frames with request ids, pipelined both ways.

A frame is `kind, id, meta length, padding, body length` (little-endian uint32 each), the meta as a JSON object, then
the body. `padding` says how far into a fresh buffer the receiver should put the body, so that the tensors behind the
body's JSON header lie aligned and need no copy.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, NamedTuple

import orjson

HEAD = struct.Struct("<IIIII")
ALIGNMENT = 16
MAX_BODY = 2**32 - 1


class Kind(IntEnum):
    """What the parent asks; an answer carries REPLY or FAILED (meta: {"error"}) and the question's id.

    PROGRESS is a sign of life of a child that computes for long; it answers nothing.
    """

    REPLY = 0
    FAILED = 1
    LOAD = 2
    GOLDEN = 3
    INFER = 4
    STATS = 5
    PING = 6
    EXIT = 7
    PROGRESS = 8


class Frame(NamedTuple):
    kind: int
    id: int
    meta: dict[str, Any]
    body: memoryview | bytes


def head(kind: Kind, id: int, meta: Mapping[str, Any], size: int = 0, padding: int = 0) -> bytes:
    """All of a frame but its body of `size` bytes."""
    text = orjson.dumps(meta)
    return HEAD.pack(kind, id, len(text), padding, size) + text


def padding(header_length: int | None) -> int:
    """Bytes to leave free before a body so that what follows its JSON header is aligned."""
    return 0 if header_length is None else -header_length % ALIGNMENT


def read(sock: socket.socket) -> Frame | None:
    """The next frame from a blocking socket, its body writable and placed as the sender asked; None at the end."""
    fixed = bytearray(HEAD.size)
    if not _fill(sock, memoryview(fixed)):
        return None
    kind, id, meta_size, pad, size = HEAD.unpack(fixed)
    text, body = bytearray(meta_size), memoryview(bytearray(pad + size))[pad:]
    got = sock.recvmsg_into([text, body])[0]
    if got < meta_size + size and not (
        _fill(sock, memoryview(text)[min(got, meta_size) :]) and _fill(sock, body[max(0, got - meta_size) :])
    ):
        return None
    return Frame(kind, id, orjson.loads(text), body)


def readable(sock: socket.socket) -> bool:
    """Whether a frame has begun to arrive, or the end has."""
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


def _fill(sock: socket.socket, view: memoryview) -> bool:
    while view.nbytes:
        count = sock.recv_into(view)
        if count == 0:
            return False
        view = view[count:]
    return True


def write(sock: socket.socket, frame_head: bytes, parts: list[bytes | memoryview]) -> None:
    """Send one frame on a blocking socket, gathered into one system call where the kernel takes it."""
    buffers = [frame_head, *parts]
    total = sum(len(part) for part in buffers)
    sent = sock.sendmsg(buffers)
    if sent < total:
        sock.sendall(b"".join(buffers)[sent:])


class Parser:
    """Splits the bytes that an event loop delivers into frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes; the rest waits for more."""
        if self._held:
            self._held += data
            if len(self._held) < self._wanted():
                return
            data, self._held = bytes(self._held), bytearray()
        at, end = 0, len(data)
        while end - at >= HEAD.size:
            kind, id, meta_size, _, size = HEAD.unpack_from(data, at)
            body = at + HEAD.size + meta_size
            if body + size > end:
                break
            yield Frame(kind, id, orjson.loads(data[at + HEAD.size : body]), data[body : body + size])
            at = body + size
        self._held += data[at:]

    def _wanted(self) -> int:
        if len(self._held) < HEAD.size:
            return HEAD.size
        _, _, meta_size, _, size = HEAD.unpack_from(self._held)
        return HEAD.size + int(meta_size) + int(size)
