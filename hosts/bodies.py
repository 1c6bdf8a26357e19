"""An inference request's body on its way in: plain, bounded in size, and in sum with the others that are here.

How long it may take is the connection's business (inbound.protocol), which ends a client that stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

from weighbridge.hosts import inflate
from weighbridge.hosts.errors import BadRequest, BodyLate, ClientLeft, TooLarge
from weighbridge.hosts.room import UNCOUNTED, Room, Share
from weighbridge.hosts.settings import HostSettings

Receive = Callable[[], Awaitable[dict[str, Any]]]
Headers = list[tuple[bytes, bytes]]
Scope = dict[str, Any]

_DIGITS = 19
"""No number of bytes has more; a longer one is no number that anybody meant."""


class Body(NamedTuple):
    """An inference body, undone of its encoding, and how many bytes of it are the JSON header (None: all)."""

    data: bytes | bytearray
    header_length: int | None
    share: Share


class _Announced(NamedTuple):
    """What the headers say: bytes of the JSON header, Content-Encoding, bytes of the body (0 where it is chunked)."""

    header_length: int | None
    coding: str
    length: int


class Bodies:
    """Reads bodies, and holds room for them until they are answered."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self.room = Room(settings.held_bytes, settings.held_bytes_per_address)

    async def read(self, scope: Scope, receive: Receive) -> Body:
        """The whole body; the caller must `release` it.

        Raises BadRequest, TooLarge, Overloaded, TooMuchHeld, BodyLate, ClientLeft.
        """
        announced = self._announced(scope["headers"])
        share = _share(scope)
        self.room.check()
        try:
            if announced.length > UNCOUNTED:
                self.room.take(share, announced.length)
            data = await self._arrived(receive, share)
            if announced.coding:
                data = await self._unpacked(data, announced.coding, share)
        except BaseException:
            self.room.give(share)
            raise
        return Body(data, announced.header_length, share)

    def release(self, body: Body) -> None:
        """It is answered."""
        self.room.give(body.share)

    @contextlib.contextmanager
    def answered(self, scope: Scope, size: int) -> Iterator[None]:
        """Count an answer of `size` bytes while the block runs."""
        share = _share(scope)
        self.room.exceed(share, size)
        try:
            yield
        finally:
            self.room.give(share)

    def _announced(self, headers: Headers) -> _Announced:
        header_length, encodings, length = None, list[str](), 0
        for name, value in headers:
            if name == b"inference-header-content-length":
                header_length = _length(name, value)
                if header_length > self._settings.max_body_bytes:
                    raise BadRequest(f"{name.decode()} {header_length} exceeds any body that this host takes")
            elif name == b"content-encoding":
                encodings.append(value.decode("latin-1"))
            elif name == b"content-length" and (length := _length(name, value)) > self._settings.max_body_bytes:
                raise TooLarge(f"the body has {length} bytes, this host takes {self._settings.max_body_bytes}")
        return _Announced(header_length, inflate.coding(",".join(encodings)) if encodings else "", length)

    async def _arrived(self, receive: Receive, share: Share) -> bytes | bytearray:
        """Most bodies are one message, and not copied."""
        data, more = _part(await receive())
        self._fit(share, len(data))
        if not more:
            return data
        body = bytearray(data)
        try:
            async with asyncio.timeout(None) as patience:
                share.give_way = lambda: patience.reschedule(0.0)
                while more:
                    data, more = _part(await receive())
                    share.heard = time.monotonic()
                    self._fit(share, len(body) + len(data))
                    body += data
        except TimeoutError as exc:
            raise BodyLate("the body stood still while others needed its room; send it again") from exc
        finally:
            share.give_way = None
        return body

    def _fit(self, share: Share, size: int) -> None:
        """Let the body be of `size` bytes."""
        if size > self._settings.max_body_bytes:
            raise TooLarge(f"the body exceeds this host's {self._settings.max_body_bytes} bytes")
        self._reserve(share, size)

    async def _unpacked(self, packed: bytes | bytearray, coding: str, share: Share) -> bytearray:
        settings, plain = self._settings, bytearray()
        for piece in inflate.pieces(packed, coding, settings.max_body_bytes, settings.max_inflation):
            self._reserve(share, len(packed) + len(plain) + len(piece))
            plain += piece
            await asyncio.sleep(0)
        return plain

    def _reserve(self, share: Share, size: int) -> None:
        if size > max(share.size, UNCOUNTED):
            self.room.take(share, size)


def _share(scope: Scope) -> Share:
    client = scope.get("client")
    return Share(client[0] if client else "", heard=time.monotonic())


def _part(message: dict[str, Any]) -> tuple[bytes, bool]:
    if message["type"] == "http.disconnect":
        raise ClientLeft("the client left in the middle of its body")
    return message.get("body", b""), message.get("more_body", False)


def _length(name: bytes, value: bytes) -> int:
    if not value.isdigit() or len(value) > _DIGITS:
        raise BadRequest(f"{name.decode()} must be a number of bytes, not {value[:40].decode('latin-1')!r}")
    return int(value)
