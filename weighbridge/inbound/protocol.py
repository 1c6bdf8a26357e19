"""uvicorn's HTTP protocol with an end to every wait for a client, and a limit to what a connection holds of ours.

uvicorn starts an application when the headers are complete, and has no deadline but for idle connections: who sends no
headers, stops in the middle of a body, or does not take an answer is waited for for ever, and headers and pipelined
requests pile up without a bound. Only the protocol can see this. Its rules (InboundSettings has the numbers):

- the headers are here `header_seconds` after a request's first byte, a new connection's first byte as soon;
- a body goes on: its next 64 KiB, or its end, come within `stall_seconds`, however long all of it takes. Bytes that
  drip in win nothing. Time while we do not read does not count;
- an answer is taken as fast;
- of a request that was answered before its end, the rest is read and thrown away for `header_seconds`, since to close
  over unread bytes would take the answer with it;
- one connection too many ends the one that has waited longest (inbound.gate).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from weighbridge.inbound.gate import Gate, that_this_process_can_hold
from weighbridge.inbound.settings import InboundSettings

log = logging.getLogger(__name__)

Render = Callable[[int, str], tuple[bytes, bytes]]
"""(Content-Type, body) of an error in the words of the server's own protocol."""

LEFT = "left"
"""Key in the scope's state: a set of functions that are called when the client leaves."""

_PROGRESS = 1 << 16
"""Bytes that count as going on."""
_MOST_HEADERS, _MOST_HEADER_BYTES = 100, 1 << 16
_MOST_PIPELINED = 32
_OVERHEAD = 16
"""Most bytes around one byte of a chunked body; one byte a chunk has five."""
_NEVER = float("inf")
_STATUS = {
    400: b"400 Bad Request",
    408: b"408 Request Timeout",
    431: b"431 Request Header Fields Too Large",
    503: b"503 Service Unavailable",
}


class GuardedProtocol(HttpToolsProtocol):
    """`guarded` makes the class that a server uses."""

    limits: InboundSettings
    gate: Gate[GuardedProtocol]
    watch: Watch
    render: Render

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._due, self._unsent_due = _NEVER, _NEVER
        self._unsent = 0
        self._in_headers = self._in_body = False
        self._overhead = self._since_progress = 0
        self._left: set[Callable[[], None]] = set()
        self._answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if (longest := self.gate.in_the_way(address)) is not None:
            longest.make_room()
        self._due = self.loop.time() + self.limits.header_seconds
        if self.gate.enter(self, address):
            self.watch.begin(self.loop)
        else:
            self._refuse(503, "this server holds as many connections as it may (connections, connections_per_address)")

    def connection_lost(self, exc: Exception | None) -> None:
        self.gate.leave(self)
        left, self._left = self._left, set()
        if self._answered is not None:  # of several requests uvicorn tells the last one only
            self._answered.disconnected = not self._answered.response_complete
            self._answered.message_event.set()
        super().connection_lost(exc)
        for leave in left:
            leave()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():  # refused: nothing that still comes is looked at
            return
        self._overhead += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_headers and self._overhead > _MOST_HEADER_BYTES:
            self._refuse(431, f"a request's headers have at most {_MOST_HEADER_BYTES} bytes")
        elif self._in_body and self._overhead > _MOST_HEADER_BYTES:
            self.transport.abort()  # chunks that are all frame, or a trailer without an end
        elif not (self._in_headers or self._in_body or self._at_work()):
            # Empty lines between two requests; uvicorn has stopped its timer for them.
            self._due = min(self._due, self.loop.time() + self.limits.header_seconds)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise httptools.HttpParserError(f"more than {_MOST_PIPELINED} requests at once on one connection")
        super().on_message_begin()
        self.scope["state"][LEFT] = self._left
        self._in_headers, self._overhead = True, 0
        self._due = self.loop.time() + self.limits.header_seconds

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= _MOST_HEADERS:
            raise httptools.HttpParserError(f"more than {_MOST_HEADERS} headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers, self._in_body = False, True
        super().on_headers_complete()
        self._went_on()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._overhead = max(0, self._overhead - _OVERHEAD * len(body))
        self._since_progress += len(body)
        if self._since_progress >= _PROGRESS:
            self._went_on()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body, self._due = False, _NEVER
        self.gate.work(self)
        super().on_message_complete()
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body:
            self._due = min(self._due, self.loop.time() + self.limits.header_seconds)
        self._wait()
        self._await_taking()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_taking()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unsent_due = _NEVER

    def look(self, now: float) -> None:
        """End what is over time."""
        if now >= self._unsent_due:
            self._taken(now)
        if now >= self._due:
            self._late(now)

    def make_room(self) -> None:
        """End for another connection: this one has waited longest for its client."""
        self.gate.leave(self)
        self._close(503, "this connection waited longest for its client when another needed its place")

    def _went_on(self) -> None:
        self._since_progress = 0
        self._due = self.loop.time() + self.limits.stall_seconds
        self._wait()

    def _wait(self) -> None:
        if not self._at_work():
            self.gate.wait(self)

    def _at_work(self) -> bool:
        """Whether a request that is here whole waits for its answer."""
        if self.pipeline:
            return True
        return self.cycle is not None and not self.cycle.response_complete and not self._in_body

    def _late(self, now: float) -> None:
        cycle = self.cycle
        if self._in_headers and cycle is not None and not cycle.response_complete:
            cycle.keep_alive, self._due = False, _NEVER  # one before is being answered: end after that
        elif self._in_body and self.flow.read_paused:
            self._due = now + self.limits.stall_seconds  # we did not read
        elif self._in_headers:
            self._close(408, "the request's headers did not arrive in time (header_seconds)")
        else:
            self._close(408, "the request's body did not go on in time (stall_seconds)")

    def _close(self, status: int, why: str) -> None:
        """End the connection; who is in the middle of a request that has no answer yet is told why."""
        begun = self._in_headers or (self._in_body and not self.cycle.response_started)
        if begun and not self.pipeline and not self.transport.is_closing():
            self._refuse(status, why)
        elif self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _refuse(self, status: int, why: str) -> None:
        """Answer in place of the application, and close. It sees a client that left."""
        kind, body = self.render(status, why)
        retry = b"retry-after: 1\r\n" if status == 503 else b""
        head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\nconnection: close\r\n%bcontent-length: %d\r\n\r\n"
        self.transport.write(head % (_STATUS[status], kind, retry, len(body)) + body)
        self.transport.close()
        self._await_taking()
        if self._unsent and self not in self.gate:
            self.transport.abort()  # nobody looks after it

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _await_taking(self) -> None:
        """What is written must be taken by the client, also behind a close."""
        self._unsent = self.transport.get_write_buffer_size()
        self._unsent_due = self.loop.time() + self.limits.stall_seconds if self._unsent else _NEVER

    def _taken(self, now: float) -> None:
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        if self._unsent > before - _PROGRESS and self._unsent:
            self.transport.abort()
        else:
            self._unsent_due = now + self.limits.stall_seconds if self._unsent else _NEVER


class Watch:
    """Looks at every connection of a gate again and again while it holds any."""

    def __init__(self, gate: Gate[GuardedProtocol], pause: float) -> None:
        self._gate, self._pause = gate, pause
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None:
            self._timer = loop.call_later(self._pause, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for one in self._gate.held():
            one.look(now)
        if self._gate:
            self.begin(loop)


def guarded(limits: InboundSettings, render: Render) -> type[GuardedProtocol]:
    """The protocol of one server: give it to uvicorn as `http`."""
    most = that_this_process_can_hold(limits.connections)
    if most < limits.connections:
        log.warning("this process may open too few files for %d connections: it holds %d", limits.connections, most)
    gate = Gate[GuardedProtocol](most, limits.connections_per_address)
    pause = min(1.0, limits.header_seconds / 4, limits.stall_seconds / 4)
    return type(
        "GuardedProtocol",
        (GuardedProtocol,),
        {"limits": limits, "gate": gate, "watch": Watch(gate, pause), "render": staticmethod(render)},
    )
