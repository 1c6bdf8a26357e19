"""The registry's server process: waits for its database, listens, says where, and ends cleanly."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence

import tenacity
import uvicorn

from weighbridge.registry import tokens
from weighbridge.registry.api.app import create_app, is_loopback
from weighbridge.registry.api.context import Context
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Forbidden, RegistryError, Unavailable
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy
from weighbridge.registry.settings import RegistrySettings
from weighbridge.storage.blobs import Blobs

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 5
"""Longest wait for open requests at the end; long polls are answered at once."""


class CannotListen(RegistryError, OSError):
    """The address or port cannot be used; the message says which and why."""

    code = "cannot-listen"


def serve(
    settings: RegistrySettings,
    db: Database,
    notifier: Notifier,
    blobs: Blobs,
    policies: Sequence[Policy] = (),
    *,
    ready: Callable[[str], None] = lambda url: None,
    stop: threading.Event | None = None,
) -> None:
    """Serve the API until SIGINT or SIGTERM (in the main thread), or until `stop` is set.

    Waits for a database that is down, and brings its schema up to date. `ready` gets the URL once it answers. Raises
    CannotListen, Forbidden (off loopback without any admin token).
    """
    stop = stop or threading.Event()
    sock = _bind(settings)
    try:
        if not _open_database(db, stop):
            return
        _check_exposure(settings, db)
        app = create_app(db, notifier, blobs, settings, policies)
        _Server(app, settings, sock, ready, stop).run(sockets=[sock])
    finally:
        sock.close()


def _bind(settings: RegistrySettings) -> socket.socket:
    """Take the port first: who cannot have it should say so before anything else happens."""
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Not listening yet: before the app is ready, callers are refused rather than kept waiting.
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
            "choose another registry.port (0: a free one) or end what uses it"
        ) from error
    return sock


def _open_database(db: Database, stop: threading.Event) -> bool:
    """Upgrade the schema as soon as the database answers; False when it is time to stop before that."""
    said = ""

    def say(state: tenacity.RetryCallState) -> None:
        nonlocal said
        reason = str(state.outcome.exception()) if state.outcome else ""
        if reason != said:
            logger.error("%s; trying again until it answers", reason)
        said = reason

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        wait=tenacity.wait_exponential(multiplier=0.1, max=5),
        stop=tenacity.stop_when_event_set(stop),
        sleep=tenacity.sleep_using_event(stop),
        after=say,
        reraise=True,
    )
    try:
        retrying(db.upgrade)
    except Unavailable:
        return False
    if said:
        logger.warning("the database answers now")
    return True


def _check_exposure(settings: RegistrySettings, db: Database) -> None:
    """Off loopback every call needs a token, so there must be one."""
    if is_loopback(settings.host):
        return
    with db.read() as tx:
        if not tokens.has_admin(tx):
            raise Forbidden(
                f"the registry would listen on {settings.host}, which other machines reach, without any admin token: "
                "create one with `weighbridge token create --role admin` beside the database, or listen on 127.0.0.1"
            )


class _Server(uvicorn.Server):
    """uvicorn that tells when it answers, ends on an event, and lets no long poll hold up its end."""

    def __init__(
        self,
        app: object,
        settings: RegistrySettings,
        sock: socket.socket,
        ready: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                lifespan="on",
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                ssl_certfile=settings.tls_certificate or None,
                ssl_keyfile=settings.tls_key or None,
            )
        )
        self._context: Context = app.state.context  # type: ignore[attr-defined]
        self._settings, self._sock, self._ready, self._stop = settings, sock, ready, stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready(self._settings.url or _url(self._settings, self._sock))

    async def on_tick(self, counter: int) -> bool:
        if self._stop.is_set():
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._context.pulse.end()
        await super().shutdown(sockets)


def _url(settings: RegistrySettings, sock: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_certificate else 'http'}://{host}:{sock.getsockname()[1]}"
