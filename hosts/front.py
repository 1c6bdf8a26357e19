"""The host's HTTP face: the Open Inference Protocol v2 as a raw ASGI application.

It never reads an inference body: the slot's engine child decodes, computes and encodes. What does not belong here:
codecs, loading, and any way to change what is served. Assignments come from the registry.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import orjson
import uvicorn

import weighbridge
from weighbridge.hosts import codec, frames, metrics
from weighbridge.hosts.children import Child
from weighbridge.hosts.errors import (
    BadRequest,
    DeadlineExceeded,
    HostError,
    MethodNotAllowed,
    NotReady,
    Overloaded,
    RouteNotFound,
    TooLarge,
)
from weighbridge.hosts.frames import Frame, Kind
from weighbridge.hosts.router import Slot, Slots, State
from weighbridge.hosts.settings import HostSettings

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

EXTENSIONS = ["binary_tensor_data", "model_repository(index)"]
_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


class Target(NamedTuple):
    """What a path under /v2/models/ names; `verb` is "", "ready" or "infer"."""

    model: str
    version: str | None
    verb: str


class Body(NamedTuple):
    """An inference body as it came, and the two headers that say how to read it."""

    data: bytes
    header_length: int | None
    encoding: str


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

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            status, headers, body = await self._respond(scope, receive)
        except HostError as exc:
            status, headers, body = exc.status, [_JSON], codec.encode_error(str(exc))
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _respond(self, scope: dict[str, Any], receive: Receive) -> tuple[int, Headers, bytes]:
        path, method = scope["path"], scope["method"]
        if path.startswith("/v2/models/") and (target := parse_target(path)) is not None:
            _demand(method, "POST" if target.verb == "infer" else "GET", path)
            if target.verb == "infer":
                return await self._infer(target, await self._read(scope["headers"], receive))
            return self._ready(target) if target.verb == "ready" else self._metadata(target)
        if path == "/v2/repository/index":
            _demand(method, "POST", path)
            return _json(200, self._index())
        if path.startswith("/v2/repository/models/") and path.endswith(("/load", "/unload")):
            raise MethodNotAllowed("this host holds what the registry assigns: start a rollout there instead")
        return self._plain(path, method)

    def _plain(self, path: str, method: str) -> tuple[int, Headers, bytes]:
        if path not in ("/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/metrics"):
            raise RouteNotFound(f"no such path: {path}")
        _demand(method, "GET", path)
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

    async def _read(self, headers: Headers, receive: Receive) -> Body:
        length, encoding = None, ""
        for name, value in headers:
            if name == b"inference-header-content-length":
                length = _length(name, value)
            elif name == b"content-encoding":
                encoding = value.decode("latin-1").strip().lower()
            elif name == b"content-length" and _length(name, value) > self._settings.max_body_bytes:
                raise TooLarge(f"the body has {value.decode()} bytes, this host takes {self._settings.max_body_bytes}")
        message = await receive()
        if not message.get("more_body"):
            return Body(message.get("body", b""), length, encoding)
        return Body(await self._read_rest(message, receive), length, encoding)

    async def _read_rest(self, message: dict[str, Any], receive: Receive) -> bytes:
        parts, size = [message.get("body", b"")], len(message.get("body", b""))
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                while message.get("more_body"):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise BadRequest("the client left in the middle of its body")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._settings.max_body_bytes:
                        raise TooLarge(f"the body exceeds this host's {self._settings.max_body_bytes} bytes")
        except TimeoutError as exc:
            raise DeadlineExceeded("the body did not arrive before the deadline") from exc
        return b"".join(parts)

    async def _infer(self, target: Target, body: Body) -> tuple[int, Headers, bytes]:
        began = time.monotonic()
        slot = self._slots.find(target.model, target.version)
        if slot.state is State.UNAVAILABLE:
            slot = await self._revived(slot, target, began)
        child = slot.enter()
        status = 500
        try:
            frame = await self._ask(child, body, began)
            status = frame.meta["status"]
        except HostError as exc:
            status = exc.status
            raise
        finally:
            slot.leave()
            slot.statistics.record(status, time.monotonic() - began)
        return status, _answer_headers(slot, frame), bytes(frame.body)

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
        except (TimeoutError, HostError) as exc:
            slot.statistics.record(503, time.monotonic() - began)
            if isinstance(exc, HostError):
                raise
            raise NotReady(f"{slot.spec.model} version {slot.spec.version} is {slot.state}: {slot.reason}") from exc
        return slot

    async def _ask(self, child: Child, body: Body, began: float) -> Frame:
        settings = self._settings
        if child.waiting >= settings.queue:
            raise Overloaded(f"{settings.queue} requests already wait for this version on this host")
        meta: dict[str, Any] = {"deadline": began + settings.request_seconds}
        if body.header_length is not None:
            meta["header"] = body.header_length
        if body.encoding:
            meta["encoding"] = body.encoding
        future = child.send(Kind.INFER, meta, body.data, frames.padding(body.header_length))
        timer = asyncio.get_running_loop().call_later(
            settings.request_seconds, _expire, future, settings.request_seconds
        )
        try:
            return await future
        except DeadlineExceeded:
            if child.silent_for(time.monotonic(), began) >= settings.hang_seconds:
                child.kill()  # it computes for nobody; its death brings the version up again
            raise
        finally:
            timer.cancel()


def _expire(future: asyncio.Future[Frame], seconds: float) -> None:
    if not future.done():
        future.set_exception(DeadlineExceeded(f"no answer within {seconds:g} s"))


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


def _demand(method: str, wanted: str, path: str) -> None:
    if method != wanted:
        raise MethodNotAllowed(f"{path} takes {wanted}, not {method}")


def _length(name: bytes, value: bytes) -> int:
    if not value.isdigit():
        raise BadRequest(f"{name.decode()} must be a number of bytes, not {value.decode('latin-1')!r}")
    return int(value)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the agent owns the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def listening(app: Front, sock: socket.socket, *, drain: float = 10.0) -> Any:
    """Serve `app` on a bound socket while the block runs; then finish what is in flight, at most `drain` seconds."""
    config = uvicorn.Config(
        app,
        loop="none",
        http="httptools",
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
