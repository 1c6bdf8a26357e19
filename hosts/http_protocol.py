"""uvicorn's HTTP protocol with a deadline that begins with a request's first byte, and an end for silent connections.

uvicorn starts the application when the headers are complete; until then only the protocol can see that they do not
come. It leaves the time of the first byte in the scope's state, for the application to count on from there. What still
comes of a request that was answered before its end is read and thrown away (a connection that is closed over unread
bytes would take the answer with it), until the deadline.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from weighbridge.hosts import codec

BEGAN = "began"
"""Key in the scope's state: when the first byte came (monotonic clock)."""
_BODY = codec.encode_error("the request's headers did not arrive before the deadline")
_LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
_ANSWER = _LATE + b"content-length: %d\r\n\r\n" % len(_BODY) + _BODY


class TimelyProtocol(HttpToolsProtocol):
    """`seconds`: until a request must be here whole; also how long a new connection may stay silent."""

    seconds = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._due: asyncio.TimerHandle | None = None
        self._in_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._due = self.loop.call_later(self.seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._came()
        super().on_message_begin()
        self.scope["state"][BEGAN] = time.monotonic()
        self._due, self._in_headers = self.loop.call_later(self.seconds, self._late), True

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._came()
        super().on_message_complete()

    def _came(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # the application is answering, this request or one before: end after that
        elif not self.transport.is_closing():
            if self._in_headers:
                self.transport.write(_ANSWER)
            self.transport.close()


def timely(seconds: float) -> type[TimelyProtocol]:
    """The protocol with its deadline."""
    return type("TimelyProtocol", (TimelyProtocol,), {"seconds": seconds})
