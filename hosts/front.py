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
from weighbridge.hosts.bodies import Bodies, Body, Headers, Receive, Scope
from weighbridge.hosts.children import Child
from weighbridge.hosts.errors import (
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
from weighbridge.hosts.frames import Frame
from weighbridge.hosts.router import Slot, Slots, State
from weighbridge.hosts.settings import HostSettings
from weighbridge.inbound.callers import CallerRefused, Callers
from weighbridge.inbound.protocol import LEFT, guarded

log = logging.getLogger(__name__)

Send = Callable[[dict[str, Any]], Awaitable[None]]

EXTENSIONS = ["binary_tensor_data", "model_repository(index)"]
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")
_RETRY = (b"retry-after", b"1")
_COMES_AGAIN = (429, 503)
"""What is missing is being brought up, or a queue that moves, or room that others give back."""
_LARGE_ANSWER = 1 << 16
"""Bytes from which on an answer counts among what is held, until the client has taken it."""
_READING = ("GET", "HEAD")
_ASKED_AGAIN = frozenset({Blame.REFUSED, Blame.INPUT})
_LARGEST_ASKED = 1 << 20
"""Bytes of a body that the version before is asked about."""


_TIMES_CONNECTIONS = 2
"""uvicorn's own limit counts connections that are closing as well; ours (inbound.gate) comes first."""


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


class Request(NamedTuple):
    """One inference: what it asks, since when it is here whole (monotonic clock), what its client's leaving calls."""

    target: Target
    body: Body
    began: float
    leavers: set[Callable[[], None]]


class Front:
    """The ASGI application over the host's slots."""

    def __init__(self, slots: Slots, settings: HostSettings) -> None:
        self._slots, self._settings = slots, settings
        self._bodies = Bodies(settings)
        self._callers = Callers.of(settings.address, settings.url, settings.server_names, settings.origins)
        self._opinion: asyncio.Task[None] | None = None

    @property
    def settings(self) -> HostSettings:
        return self._settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            self._callers.check(scope["headers"])
            status, headers, body = await self._respond(scope, receive)
        except (HostError, CallerRefused) as exc:
            status, headers, body = exc.status, _error_headers(exc), codec.encode_error(str(exc))
        if status in _COMES_AGAIN:
            headers.append(_RETRY)
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if len(body) < _LARGE_ANSWER:
            await send({"type": "http.response.body", "body": body})
        else:
            await self._taken(scope, body, send)

    async def _taken(self, scope: Scope, body: bytes, send: Send) -> None:
        """Send a large answer, and count it as held until it is taken."""
        with self._bodies.answered(scope, len(body)):
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})  # waits while the connection's buffer is full

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

    async def _inferred(self, target: Target, scope: Scope, receive: Receive) -> tuple[int, Headers, bytes]:
        """Read the body of a request that somebody here can answer, and have it answered."""
        self._free_to_ask(self._slots.find(target.model, target.version))
        request = Request(target, await self._bodies.read(scope, receive), time.monotonic(), _leavers(scope))
        try:
            return await self._infer(request)
        finally:
            self._bodies.release(request.body)

    async def _infer(self, request: Request) -> tuple[int, Headers, bytes]:
        target = request.target
        slot = self._slots.find(target.model, target.version)
        fault, told = Blame.NOBODY, False
        try:
            slot = await self._standing(slot, request)
            try:
                frame = await self._ask(slot, request)
            except Crashed:
                raise
            except ChildDied:  # it never came to this request, and programs are pure: ask the next child, once
                await asyncio.sleep(0)  # the slot hears of the death in the loop's next turn
                slot = await self._standing(self._slots.find(target.model, target.version), request)
                frame = await self._ask(slot, request)
            fault, told = Blame(frame.meta.get("blame", Blame.NONE)), True
        except HostError as exc:
            fault, told = blame.of(exc), isinstance(exc, Overlong)
            raise
        finally:
            seconds = time.monotonic() - request.began
            if fault in _ASKED_AGAIN and told:
                self._ask_again(slot, request, fault, seconds)
            else:
                slot.statistics.record(fault, seconds)
        return frame.meta["status"], _answer_headers(slot, frame), bytes(frame.body)

    def _ask_again(self, slot: Slot, request: Request, fault: Blame, seconds: float) -> None:
        """Have the version before tell whose fault it was, one request at a time; without one, record what is known."""
        elder = self._slots.elder(slot)
        if elder is None or self._opinion is not None or len(request.body.data) > _LARGEST_ASKED:
            slot.statistics.record(fault, seconds)
        else:
            again = request._replace(began=time.monotonic(), leavers=set())
            self._opinion = asyncio.create_task(self._second_opinion(slot, elder, again, fault, seconds))

    async def _second_opinion(self, slot: Slot, elder: Slot, request: Request, fault: Blame, seconds: float) -> None:
        """What fails on the version before too lies in the request; what that one answers, this version should have."""
        try:
            frame = await self._ask(elder, request)
            fault = Blame.VERSION if frame.meta["status"] == 200 else Blame.CLIENT
        except Overlong:
            fault = Blame.CLIENT
        except HostError as exc:
            log.debug("no second opinion of version %s: %s", elder.spec.version, exc)
        finally:
            self._opinion = None
            slot.statistics.record(fault, seconds)

    async def _standing(self, slot: Slot, request: Request) -> Slot:
        """The slot, or what answers once its child, which died, is brought up again."""
        return await self._revived(slot, request) if slot.state is State.UNAVAILABLE else slot

    async def _revived(self, slot: Slot, request: Request) -> Slot:
        """Wait in the queue while the child that died is brought up again; then what answers by now."""
        settings, target = self._settings, request.target
        try:
            async with asyncio.timeout(settings.request_seconds - (time.monotonic() - request.began)):
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

    async def _ask(self, slot: Slot, request: Request) -> Frame:
        child = slot.enter()
        try:
            return await self._answer(child, slot, request)
        finally:
            slot.leave()

    async def _answer(self, child: Child, slot: Slot, request: Request) -> Frame:
        self._free_to_ask(slot)
        body, deadline = request.body, request.began + self._settings.request_seconds
        meta: dict[str, Any] = {"deadline": deadline}
        if body.header_length is not None:
            meta["header"] = body.header_length
        asked = child.infer(meta, body.data, frames.padding(body.header_length))

        def leave() -> None:
            child.drop(asked)

        left = deadline - time.monotonic()
        timer = asyncio.get_running_loop().call_later(max(0.0, left), child.expire, asked)
        request.leavers.add(leave)
        try:
            return await asked.future
        finally:
            request.leavers.discard(leave)
            timer.cancel()

    def _free_to_ask(self, slot: Slot) -> None:
        """Raise Overloaded where as many wait as may."""
        if slot.child is not None and slot.child.waiting >= self._settings.queue:
            raise Overloaded(f"{self._settings.queue} requests already wait for this version on this host")


def _leavers(scope: Scope) -> set[Callable[[], None]]:
    """What is called when the client leaves."""
    leavers: set[Callable[[], None]] = scope.get("state", {}).get(LEFT, set())
    return leavers


def _error_headers(error: HostError | CallerRefused) -> Headers:
    headers: Headers = [_JSON]
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.allow).encode()))
    if isinstance(error, UnsupportedEncoding):
        headers.append((b"accept-encoding", b"gzip, deflate"))
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
    """Serve `app` on a bound socket while the block runs; then finish what is in flight, at most `drain` seconds."""
    settings = app.settings
    config = uvicorn.Config(
        app,
        loop="none",
        http=guarded(settings, lambda status, why: (b"application/json", codec.encode_error(why))),
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_level="error",  # its warnings are what any client can write into our log as often as it likes
        server_header=False,
        date_header=False,
        timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]  # call_later takes fractions
        limit_concurrency=_TIMES_CONNECTIONS * settings.connections,
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
