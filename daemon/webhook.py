"""The listener that a store's bucket notifications arrive at: raw ASGI, one POST is some hints."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

import uvicorn

from weighbridge.daemon.loops import Health
from weighbridge.storage.events import Sink
from weighbridge.storage.notifications import MAX_BODY, MalformedNotification, parse

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_START_SECONDS = 10.0


class InsecureWebhook(ValueError):
    """A listener that every user of this machine, and every page that they open, could send hints to."""


class _Refused(Exception):
    """An answer other than 200: its status and what was wrong."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


class Notifications:
    """The ASGI app. `POST /` takes a notification of `bucket`, `GET /healthz` says whether the loops advance.

    Without a `token` it takes none. `limit` is how many seconds a loop may be late and still be well.
    """

    def __init__(
        self,
        tell: Sink,
        *,
        bucket: str,
        prefix: str = "",
        token: str | None = None,
        health: Callable[[], Iterable[Health]] = tuple,
        limit: float = 60.0,
    ) -> None:
        self._tell, self._bucket, self._prefix = tell, bucket, prefix
        self._token, self._health, self._limit = token, health, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            status, body = await self._answer(scope, receive)
        except _Refused as refused:
            status, body = refused.status, {"title": refused.detail, "status": refused.status}
        data = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, dict[str, Any]]:
        method, path = scope["method"], scope["path"]
        if path == "/healthz" and method in ("GET", "HEAD"):
            return self._healthz()
        if path != "/":
            raise _Refused(404, f"no {path}: notifications are posted to /")
        if method in ("GET", "HEAD"):
            return 200, {"title": "post bucket notifications here"}  # MinIO asks before it accepts a target
        if method != "POST":
            raise _Refused(405, f"{method} is not possible: notifications are posted")
        self._check_token(scope)
        try:
            events = parse(await _body(scope, receive), bucket=self._bucket, prefix=self._prefix)
        except MalformedNotification as error:
            log.warning("a notification was refused: %s", error)
            raise _Refused(400, str(error)) from error
        for event in events:
            self._tell(event)
        return 200, {"hints": len(events)}

    def _check_token(self, scope: Scope) -> None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self._token is None or not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise _Refused(401, "the bearer token of the webhook is missing or wrong (daemon.webhook_token)")

    def _healthz(self) -> tuple[int, dict[str, Any]]:
        loops = list(self._health())
        well = all(loop.late < self._limit and not loop.failing for loop in loops)
        told = {loop.name: {"late_seconds": round(loop.late, 3), "failing": loop.failing} for loop in loops}
        return (200 if well else 503), {"ok": well, "loops": told}


class Listener:
    """Serves the app in a thread. With `port` 0 a free one is taken; `url` says which."""

    def __init__(self, app: Notifications, host: str, port: int, *, token: str | None) -> None:
        if token is None:
            raise InsecureWebhook(
                f"webhook on {host}: a bearer token is required, on loopback too (daemon.webhook_token, e.g. from "
                "`openssl rand -hex 24`), or anybody could send hints; the store that notifies sends it"
            )
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            ws="none",
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        self._server, self._host = _Server(config), host
        self._socket = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._socket.getsockname()[1]}/"

    def start(self) -> None:
        self._thread.start()
        if not self._server.up.wait(_START_SECONDS):
            raise RuntimeError("the webhook's listener did not start")
        log.info("bucket notifications are taken at %s", self.url)

    def stop(self) -> None:
        """End within seconds; a request under way is answered."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(_START_SECONDS)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = threading.Event()

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup(list(sockets) if sockets is not None else None)
        self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        """Signals are the daemon's."""
        yield


async def _body(scope: Scope, receive: Receive) -> bytes:
    """Read the body, up to the cap."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise _Refused(413, f"a notification has at most {MAX_BODY:,} bytes, this one {int(length):,}")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refused(400, "the notification was broken off")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _Refused(413, f"a notification has at most {MAX_BODY:,} bytes")
        if not message.get("more_body"):
            return bytes(body)
