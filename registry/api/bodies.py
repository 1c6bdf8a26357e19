"""How much a caller may send, and what of it is held and made of it: JSON by a budget, uploads by their size.

A body is read when it is known who sends it, what their role allows, and that what they name is there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Iterator
from typing import Final

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from weighbridge.registry.errors import Malformed, Unavailable
from weighbridge.storage import strict_json
from weighbridge.storage.strict_json import InvalidJson

MAX_JSON: Final = 1 << 20
"""Bytes. The largest reports and measurements have a tenth."""
MAX_TEMPLATE: Final = 16 << 20
"""Bytes; the parameters of a template with 100,000 tensors fit. Administrators only."""
_LARGE: Final = {"/v1/templates": MAX_TEMPLATE}
_BYTES_A_VALUE: Final = 4
"""A text may hold one value for so many of its bytes: 1 MiB of `[],[],` would become a hundred."""
_LEAST_VALUES, _MOST_VALUES = 10_000, 1_500_000
_DEPTH: Final = 16
_PER_CLIENT: Final = 4
"""One client may hold this part of what all may hold together."""
_CLOSE: Final = {"connection": "close"}


class Held:
    """The bytes of bodies that are being read or answered, by client: together at most `most`."""

    def __init__(self, most: int) -> None:
        self._most, self._sum = most, 0
        self._clients: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return self._sum

    def take(self, client: Hashable, size: int) -> None:
        """Count bytes that came. Raises Unavailable where that is too much; then nothing is counted."""
        if self._sum + size > self._most or self._clients[client] + size > max(self._most // _PER_CLIENT, MAX_TEMPLATE):
            raise Unavailable("this registry holds as many bytes of requests as it may: try again")
        self._sum += size
        self._clients[client] += size

    def release(self, client: Hashable, size: int) -> None:
        """They are held no longer."""
        self._sum -= size
        self._clients[client] -= size
        if not self._clients[client]:
            del self._clients[client]


class JsonRequest(Request):
    """A request whose body is read once, by the rules above, and parsed beside the event loop."""

    def __init__(self, scope: Scope, receive: Receive, held: Held, client: Hashable, seconds: float) -> None:
        super().__init__(scope, receive)
        self._held, self._client, self._seconds = held, client, seconds
        self._largest = _LARGE.get(scope["path"], MAX_JSON)
        self._taken = 0

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Give back at the block's end what was read within it."""
        try:
            yield
        finally:
            self._held.release(self._client, self._taken)

    async def body(self) -> bytes:
        """The whole body. Raises HTTPException (408, 413), Unavailable."""
        if not hasattr(self, "_body"):
            _refuse_announced(self, self._largest)
            try:
                async with asyncio.timeout(self._seconds):
                    self._body = await self._collect()
            except TimeoutError as exc:
                raise HTTPException(408, f"the body did not come within {self._seconds:g} s", _CLOSE) from exc
        return self._body

    async def _collect(self) -> bytes:
        parts: list[bytes] = []
        try:
            async for part in self.stream():
                if self._taken + len(part) > self._largest:
                    raise too_large("a body", self._largest)
                self._held.take(self._client, len(part))
                self._taken += len(part)
                parts.append(part)
        except ClientDisconnect as exc:
            raise HTTPException(400, "the client left in the middle of its body") from exc
        return b"".join(parts)

    async def read(self) -> None:
        """Read the body, and parse it where it says that it is JSON. Raises Malformed, HTTPException, Unavailable.

        (What is raised within FastAPI's own reading becomes a 400 without a reason.)
        """
        data = await self.body()
        if not data or "json" not in self.headers.get("content-type", ""):
            return
        values = min(max(len(data) // _BYTES_A_VALUE, _LEAST_VALUES), _MOST_VALUES)
        try:
            self._json = await run_in_threadpool(strict_json.within, data, values=values, depth=_DEPTH)
        except InvalidJson as exc:
            raise Malformed(f"the body: {exc}") from exc


async def upload(request: Request, largest: int) -> AsyncIterator[bytes]:
    """The parts of an upload of at most `largest` bytes; the protocol ends one that stalls. Raises HTTPException."""
    _refuse_announced(request, largest)
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > largest:
                raise too_large("an upload", largest)
            yield part
    except ClientDisconnect as exc:
        raise HTTPException(400, "the client left in the middle of its upload") from exc


def too_large(what: str, largest: int) -> HTTPException:
    """413; the rest is not read, so the connection ends."""
    return HTTPException(413, f"{what} has at most {largest:,} bytes", _CLOSE)


def _refuse_announced(request: Request, largest: int) -> None:
    said = request.headers.get("content-length", "0")
    if not (said.isascii() and said.isdigit() and len(said) < 20):
        raise Malformed(f"Content-Length is no number of bytes: {said[:40]!r}")
    if int(said) > largest:
        raise too_large("a body", largest)
