"""The registry's server process: waits for its database, listens, says where, and ends cleanly."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import tenacity
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from weighbridge.inbound.protocol import guarded
from weighbridge.registry import tokens
from weighbridge.registry.api import problems
from weighbridge.registry.api.app import create_app
from weighbridge.registry.api.auth import is_loopback
from weighbridge.registry.api.context import Context
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Forbidden, RegistryError, Unavailable
from weighbridge.registry.notify import Notifier, open_notifier
from weighbridge.registry.recipe import Policy
from weighbridge.registry.settings import BrokerSettings, RegistrySettings
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.settings import StorageSettings

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 5
"""Longest wait for open requests at the end; long polls are answered at once."""
_REFUSED = 64
"""Connections that are being told that there are too many; uvicorn's limit is only a net below the guard's."""


class CannotListen(RegistryError, OSError):
    """The address or port cannot be used; the message says which and why."""

    code = "cannot-listen"


class RegistryNeeds(Protocol):
    """The settings that a registry reads; weighbridge.settings.Settings has them."""

    @property
    def registry(self) -> RegistrySettings: ...
    @property
    def storage(self) -> StorageSettings: ...
    @property
    def broker(self) -> BrokerSettings: ...
    @property
    def policies(self) -> tuple[Policy, ...]: ...
    @property
    def database_url(self) -> SecretStr: ...


def run(needs: RegistryNeeds, *, migrate: bool = True, ready: Callable[[str], None] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. Raises what `serve` raises, and StorageError."""
    stop = threading.Event()
    with _signals(stop), contextlib.ExitStack() as parts:
        db = Database(needs.database_url)
        parts.callback(db.close)
        notifier = open_notifier(needs.broker.url, needs.broker.channel)
        parts.callback(notifier.close)
        blobs = Blobs(needs.storage.open_artifacts(create=True), needs.storage.artifacts_prefix)
        serve(
            needs.registry, db, notifier, blobs, needs.policies, ready=ready or _say_where, stop=stop, migrate=migrate
        )
    logger.info("ended")
    return 0


def _say_where(url: str) -> None:
    logger.info("the registry answers at %s", url)


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`."""
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(
    settings: RegistrySettings,
    db: Database,
    notifier: Notifier,
    blobs: Blobs,
    policies: Sequence[Policy] = (),
    *,
    ready: Callable[[str], None] = lambda url: None,
    stop: threading.Event,
    migrate: bool = True,
) -> None:
    """Serve the API until `stop` is set.

    Waits for a database that is down; with `migrate` brings its schema up to date, without it waits until somebody did.
    `ready` gets the URL once the API answers. Raises CannotListen, Forbidden (off loopback without any admin token).
    """
    sock = _bind(settings)
    try:
        if not _await_database(db.upgrade if migrate else db.check, stop):
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


def _await_database(check: Callable[[], None], stop: threading.Event) -> bool:
    """Call `check` until it is not Unavailable, saying each reason once; False when asked to stop before that."""
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
        retrying(check)
    except Unavailable:
        return False
    if said:
        logger.warning("the database answers now")
    return True


def _check_exposure(settings: RegistrySettings, db: Database) -> None:
    """Off loopback every call needs a token, so there must be one."""
    if is_loopback(settings.host):
        return
    with db.transaction() as tx:
        if tokens.has_admin(tx):
            return
        if settings.token is None:
            raise Forbidden(
                f"the registry would listen on {settings.host}, which other machines reach, without any admin token: "
                "give it one of your own as registry.token (WEIGHBRIDGE_TOKEN, e.g. from `openssl rand -base64 32`), "
                "or start it on 127.0.0.1 first and run `weighbridge token create admin`"
            )
        tokens.adopt(tx, settings.token.get_secret_value(), "registry.token")
    logger.warning("there was no admin token yet: registry.token is one now; revoke it when you have created others")


class _Server(uvicorn.Server):
    """uvicorn that tells when it answers, ends on an event, and lets no long poll hold up its end."""

    def __init__(
        self,
        app: FastAPI,
        settings: RegistrySettings,
        sock: socket.socket,
        ready: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=guarded(settings.inbound, problems.plain),
                limit_concurrency=settings.inbound.connections + _REFUSED,
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                timeout_keep_alive=int(settings.inbound.idle_seconds),
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                ssl_certfile=settings.tls_certificate or None,
                ssl_keyfile=settings.tls_key or None,
            )
        )
        self._context: Context = app.state.context
        self._settings, self._sock, self._ready, self._stop = settings, sock, ready, stop

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Signals are the process's business: whoever runs the server sets `stop`."""
        return contextlib.nullcontext()

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
