"""The host's HTTP face: the Open Inference Protocol v2 as a raw ASGI application.

It never reads an inference body: the slot's engine child decodes, computes and encodes. What does not belong here:
codecs, loading, and any way to change what is served. Assignments come from the registry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import orjson
import uvicorn

import weighbridge
from weighbridge.hosts import blame, codec, frames, metrics
from weighbridge.hosts.blame import Blame
from weighbridge.hosts.bodies import Bodies, Body, Headers, Receive
from weighbridge.hosts.children import Asked, Child
from weighbridge.hosts.errors import (
    BodyLate,
    ChildDied,
    Crashed,
    HostError,
    MethodNotAllowed,
    NotReady,
    Overloaded,
    Overlong,
    RouteNotFound,
    UnsupportedEncoding,
)
from weighbridge.hosts.frames import Frame, Kind
from weighbridge.hosts.http_protocol import BEGAN, timely
from weighbridge.hosts.router import Slot, Slots, State
from weighbridge.hosts.settings import HostSettings

log = logging.getLogger(__name__)

Send = Callable[[dict[str, Any]], Awaitable[None]]

EXTENSIONS = ["binary_tensor_data", "model_repository(index)"]
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_CLOSE = (b"connection", b"close")
_RETRY = (b"retry-after", b"1")
"""With every 503: what is missing is being brought up, or a queue that moves."""
_READING = ("GET", "HEAD")
_ASKED_AGAIN = frozenset({Blame.REFUSED, Blame.INPUT})
_LARGEST_ASKED = 1 << 20
"""Bytes of a body that the version before is asked about."""


class Target(NamedTuple):
    """What a path under /v2/models/ names; `verb` is "", "ready" or "infer"."""

    model: str
    version: str | None
    verb: str


def parse_target(path: str) -> Target | None:
    """`/v2/models/{m}[/versions/{v}][/ready|/infer]`, or None."""
    parts = path.split("/")[3:]
    verb = parts.pop() if parts[-1] in ("ready", "infer") and len(parts) in (2, 4) else ""
    if len(parts) == 1 and parts[0]:
        return Target(parts[0], None, verb)
    if len(parts) == 3 and parts[0] and parts[1] == "versions" and parts[2]:
        return Target(parts[0], parts[2], verb)
    return None


class Front:
    """The ASGI application over the host's slots."""

    def __init__(self, slots: Slots, settings: HostSettings) -> None:
        self._slots, self._settings = slots, settings
        self._bodies = Bodies(settings)
        self._opinion: asyncio.Task[None] | None = None

    @property
    def request_seconds(self) -> float:
        """What a request may take, from its first byte to its answer."""
        return self._settings.request_seconds

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            status, headers, body = await self._respond(scope, receive)
        except HostError as exc:
            status, headers, body = exc.status, _error_headers(exc), codec.encode_error(str(exc))
        if status == 503:
            headers.append(_RETRY)
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _respond(self, scope: dict[str, Any], receive: Receive) -> tuple[int, Headers, bytes]:
        path, method = scope["path"], scope["method"]
        if path.startswith("/v2/models/") and (target := parse_target(path)) is not None:
            if target.verb == "infer":
                _demand(method, ("POST",), path)
                return await self._inferred(target, scope, receive)
            _demand(method, _READING, path)
            return self._ready(target) if target.verb == "ready" else self._metadata(target)
        if path == "/v2/repository/index":
            _demand(method, ("POST",), path)
            return _json(200, self._index())
        if path.startswith("/v2/repository/models/") and path.endswith(("/load", "/unload")):
            raise MethodNotAllowed("this host holds what the registry assigns: start a rollout there instead")
        return self._plain(path, method)

    def _plain(self, path: str, method: str) -> tuple[int, Headers, bytes]:
        if path not in ("/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/metrics"):
            raise RouteNotFound(f"no such path: {path}")
        _demand(method, _READING, path)
        if path == "/metrics":
            return 200, [(b"content-type", metrics.CONTENT_TYPE)], metrics.render(self._slots)
        if path == "/v2/health/live":
            return 200, [_JSON], b""
        if path == "/v2/health/ready":
            return (200 if self._slots.ready() else 400), [_JSON], b""
        return _json(200, {"name": "weighbridge", "version": weighbridge.__version__, "extensions": EXTENSIONS})

    def _ready(self, target: Target) -> tuple[int, Headers, bytes]:
        slot = self._slots.find(target.model, target.version)
        return (200 if slot.state is State.READY else 400), [_JSON], b""

    def _metadata(self, target: Target) -> tuple[int, Headers, bytes]:
        spec = self._slots.find(target.model, target.version).spec
        held = [target.version] if target.version else sorted(self._slots.route(target.model).versions)
        described: dict[str, Any] = {
            "name": spec.model,
            "versions": held,
            "platform": f"weighbridge_{spec.manifest.program.kind}",
            "inputs": [tensor.model_dump() for tensor in spec.manifest.inputs],
            "outputs": [tensor.model_dump() for tensor in spec.manifest.outputs],
            "parameters": {"variant": spec.variant, "artifact": spec.artifact},
        }
        return _json(200, described)

    def _index(self) -> list[dict[str, str]]:
        return [
            {
                "name": slot.spec.model,
                "version": slot.spec.version,
                "state": slot.state,
                "reason": slot.reason or "",
            }
            for slot in self._slots
        ]

    async def _inferred(self, target: Target, scope: dict[str, Any], receive: Receive) -> tuple[int, Headers, bytes]:
        """Read the body and have it answered, all within the time that began with the request's first byte."""
        began = scope.get("state", {}).get(BEGAN) or time.monotonic()
        body = await self._bodies.read(scope["headers"], receive, began)
        try:
            return await self._infer(target, body, began)
        finally:
            self._bodies.release(body)

    async def _infer(self, target: Target, body: Body, began: float) -> tuple[int, Headers, bytes]:
        slot = self._slots.find(target.model, target.version)
        fault, told = Blame.NOBODY, False
        try:
            slot = await self._standing(slot, target, began)
            try:
                frame = await self._ask(slot, body, began)
            except Crashed:
                raise
            except ChildDied:  # it never came to this request, and programs are pure: ask the next child, once
                await asyncio.sleep(0)  # the slot hears of the death in the loop's next turn
                slot = await self._standing(self._slots.find(target.model, target.version), target, began)
                frame = await self._ask(slot, body, began)
            fault, told = Blame(frame.meta.get("blame", Blame.NONE)), True
        except HostError as exc:
            fault, told = blame.of(exc), isinstance(exc, Overlong)
            raise
        finally:
            seconds = time.monotonic() - began
            if fault in _ASKED_AGAIN and told:
                self._ask_again(slot, body, fault, seconds)
            else:
                slot.statistics.record(fault, seconds)
        return frame.meta["status"], _answer_headers(slot, frame), bytes(frame.body)

    def _ask_again(self, slot: Slot, body: Body, fault: Blame, seconds: float) -> None:
        """Have the version before tell whose fault it was, one request at a time; without one, record what is known."""
        elder = self._slots.elder(slot)
        if elder is None or self._opinion is not None or len(body.data) > _LARGEST_ASKED:
            slot.statistics.record(fault, seconds)
        else:
            self._opinion = asyncio.create_task(self._second_opinion(slot, elder, body, fault, seconds))

    async def _second_opinion(self, slot: Slot, elder: Slot, body: Body, fault: Blame, seconds: float) -> None:
        """What fails on the version before too lies in the request; what that one answers, this version should have."""
        try:
            frame = await self._ask(elder, body, time.monotonic())
            fault = Blame.VERSION if frame.meta["status"] == 200 else Blame.CLIENT
        except Overlong:
            fault = Blame.CLIENT
        except HostError as exc:
            log.debug("no second opinion of version %s: %s", elder.spec.version, exc)
        finally:
            self._opinion = None
            slot.statistics.record(fault, seconds)

    async def _standing(self, slot: Slot, target: Target, began: float) -> Slot:
        """The slot, or what answers once its child, which died, is brought up again."""
        return await self._revived(slot, target, began) if slot.state is State.UNAVAILABLE else slot

    async def _revived(self, slot: Slot, target: Target, began: float) -> Slot:
        """Wait in the queue while the child that died is brought up again; then what answers by now."""
        settings = self._settings
        try:
            async with asyncio.timeout(settings.request_seconds - (time.monotonic() - began)):
                while slot.state is State.UNAVAILABLE:
                    if slot.waiting >= settings.queue:
                        raise Overloaded(f"{settings.queue} requests already wait until this version is up again")
                    slot.waiting += 1
                    try:
                        await slot.settled()
                    finally:
                        slot.waiting -= 1
                    slot = self._slots.find(target.model, target.version)
        except TimeoutError as exc:
            raise NotReady(f"{slot.spec.model} version {slot.spec.version} is {slot.state}: {slot.reason}") from exc
        return slot

    async def _ask(self, slot: Slot, body: Body, began: float) -> Frame:
        child = slot.enter()
        try:
            return await self._answer(child, body, began)
        finally:
            slot.leave()

    async def _answer(self, child: Child, body: Body, began: float) -> Frame:
        settings = self._settings
        if child.waiting >= settings.queue:
            raise Overloaded(f"{settings.queue} requests already wait for this version on this host")
        deadline = began + settings.request_seconds
        meta: dict[str, Any] = {"deadline": deadline}
        if body.header_length is not None:
            meta["header"] = body.header_length
        if body.encoding:
            meta["encoding"] = body.encoding
        asked = child.send(Kind.INFER, meta, body.data, frames.padding(body.header_length))
        left = deadline - time.monotonic()
        timer = asyncio.get_running_loop().call_later(max(0.0, left), _expire, child, asked)
        try:
            return await asked.future
        finally:
            timer.cancel()


def _expire(child: Child, asked: Asked) -> None:
    if not asked.future.done():
        asked.future.set_exception(child.held_up(asked))


def _error_headers(error: HostError) -> Headers:
    headers: Headers = [_JSON]
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.allow).encode()))
    if isinstance(error, UnsupportedEncoding):
        headers.append((b"accept-encoding", b"gzip, deflate"))
    if isinstance(error, BodyLate):
        headers.append(_CLOSE)
    return headers


def _answer_headers(slot: Slot, frame: Frame) -> Headers:
    headers: Headers = [
        _JSON,
        (b"weighbridge-version", slot.spec.version.encode()),
        (b"weighbridge-variant", slot.spec.variant.encode()),
    ]
    if (length := frame.meta.get("header")) is not None:
        headers[0] = _BINARY
        headers.append((b"inference-header-content-length", b"%d" % length))
    return headers


def _json(status: int, value: Any) -> tuple[int, Headers, bytes]:
    return status, [_JSON], orjson.dumps(value)


def _demand(method: str, wanted: tuple[str, ...], path: str) -> None:
    if method not in wanted:
        raise MethodNotAllowed(f"{path} takes {' and '.join(wanted)}, not {method}", *wanted)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the agent owns the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def listening(app: Front, sock: socket.socket, *, drain: float = 10.0) -> Any:
    """Serve `app` on a bound socket while the block runs; then finish what is in flight, at most `drain` seconds.

    A request's headers must come within the time that the application gives the request.
    """
    config = uvicorn.Config(
        app,
        loop="none",
        http=timely(app.request_seconds),
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(drain),
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]), name="front")
    try:
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        yield server
    finally:
        server.should_exit = True
        await task
