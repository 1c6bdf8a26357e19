"""An inference request's body on its way in: bounded in size, in time, and in sum with the others that are here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from weighbridge.hosts.errors import BadRequest, BodyLate, Overloaded, TooLarge
from weighbridge.hosts.settings import HostSettings

Receive = Callable[[], Awaitable[dict[str, Any]]]
Headers = list[tuple[bytes, bytes]]

_DIGITS = 19
"""No number of bytes has more; a longer one is no number that anybody meant."""


class Body(NamedTuple):
    """An inference body as it came, and the two headers that say how to read it."""

    data: bytes
    header_length: int | None
    encoding: str


class Bodies:
    """Reads bodies, and knows how many bytes of them are held: arriving, waiting for a child, or being computed."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings, self._held = settings, 0

    async def read(self, headers: Headers, receive: Receive, began: float) -> Body:
        """The whole body; the caller must `release` it. Raises BadRequest, TooLarge, Overloaded, BodyLate."""
        length, encoding = self._announced(headers)
        parts: list[bytes] = []
        try:
            await self._arrive(parts, receive, began)
        except BaseException:
            self._held -= sum(map(len, parts))
            raise
        return Body(b"".join(parts), length, encoding)

    def release(self, body: Body) -> None:
        """It is answered."""
        self._held -= len(body.data)

    def _announced(self, headers: Headers) -> tuple[int | None, str]:
        """(bytes of the JSON header, Content-Encoding) as the headers say, each number within its bounds."""
        length, encodings = None, list[str]()
        for name, value in headers:
            if name == b"inference-header-content-length":
                length = _length(name, value)
                if length > self._settings.max_body_bytes:
                    raise BadRequest(f"{name.decode()} {length} exceeds any body that this host takes")
            elif name == b"content-encoding":
                encodings.append(value.decode("latin-1").strip().lower())
            elif name == b"content-length" and _length(name, value) > self._settings.max_body_bytes:
                raise TooLarge(f"the body has {value.decode()} bytes, this host takes {self._settings.max_body_bytes}")
        return length, ",".join(encodings)

    async def _arrive(self, parts: list[bytes], receive: Receive, began: float) -> None:
        """Collect the body in `parts`, bounded in size, in sum with the others that are here, and in time."""
        settings, size, more = self._settings, 0, True
        try:
            async with asyncio.timeout(began + settings.request_seconds - time.monotonic()):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise BadRequest("the client left in the middle of its body")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size > settings.max_body_bytes:
                        raise TooLarge(f"the body exceeds this host's {settings.max_body_bytes} bytes")
                    if self._held + len(part) > settings.held_bytes:
                        raise Overloaded(f"bodies of {settings.held_bytes} bytes are held already (held_bytes)")
                    parts.append(part)
                    self._held += len(part)
        except TimeoutError as exc:
            raise BodyLate("the body did not arrive before the deadline") from exc


def _length(name: bytes, value: bytes) -> int:
    if not value.isdigit() or len(value) > _DIGITS:
        raise BadRequest(f"{name.decode()} must be a number of bytes, not {value[:40].decode('latin-1')!r}")
    return int(value)
