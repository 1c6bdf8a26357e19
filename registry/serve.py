"""The registry's server process: waits for its database, listens, says where, and ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import tenacity
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from weighbridge.inbound.protocol import guarded
from weighbridge.registry import admission
from weighbridge.registry.api import problems
from weighbridge.registry.api.app import create_app
from weighbridge.registry.api.context import Context
from weighbridge.registry.db import Database
from weighbridge.registry.errors import RegistryError, Unavailable
from weighbridge.registry.notify import Notifier, open_notifier
from weighbridge.registry.own_socket import OwnSocket, own_socket
from weighbridge.registry.recipe import Policy
from weighbridge.registry.schemas import StoreAddress
from weighbridge.registry.settings import BrokerSettings, RegistrySettings
from weighbridge.storage import private
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.private import NotPrivate
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
    def data(self) -> Path: ...
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
        data = _data_folder(needs.data.absolute())
        db = Database(needs.database_url)
        parts.callback(db.close)
        notifier = open_notifier(needs.broker.url, needs.broker.channel)
        parts.callback(notifier.close)
        blobs = Blobs(needs.storage.open_artifacts(create=True), needs.storage.artifacts_prefix)
        serve(
            needs.registry,
            db,
            notifier,
            blobs,
            needs.policies,
            address=store_address(needs.storage),
            data=data,
            ready=ready or _say_where,
            stop=stop,
            migrate=migrate,
        )
    logger.info("ended")
    return 0


def _data_folder(folder: Path) -> Path | None:
    """The data folder, closed to others; None where none can be made, which is said. Raises NotPrivate."""
    try:
        return private.make_folder(folder)
    except NotPrivate:
        raise
    except OSError as error:
        logger.warning("no data folder %s (%s): commands on this machine need WEIGHBRIDGE_TOKEN", folder, error)
        return None


def store_address(storage: StorageSettings) -> StoreAddress:
    """Where publishers find the watched store; nothing that it is opened with."""
    if "://" not in storage.url:
        return StoreAddress(url=str(Path(storage.url).expanduser().absolute()), prefix=storage.prefix)
    s3, endpoint = storage.s3, urlsplit(storage.s3.endpoint_url or "")
    bare = endpoint._replace(netloc=endpoint.netloc.rpartition("@")[2]).geturl() or None
    return StoreAddress(
        url=storage.url, prefix=storage.prefix, endpoint_url=bare, region=s3.region, path_style=s3.path_style
    )


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
    address: StoreAddress | None = None,
    data: Path | None = None,
    ready: Callable[[str], None] = lambda url: None,
    stop: threading.Event,
    migrate: bool = True,
) -> None:
    """Serve the API until `stop` is set.

    Waits for a database that is down; with `migrate` brings its schema up to date, without it waits until somebody did.
    In `data` (0700) a token and a socket are left for this user; `address` is what publishers are told of the store.
    `ready` gets the URL once the API answers. Raises CannotListen, NotPrivate, Forbidden (nobody could call).
    """
    with contextlib.ExitStack() as parts:
        sock = parts.enter_context(_bind(settings))
        own = parts.enter_context(own_socket(data, settings.socket)) if data is not None else None
        if not _await_database(db.upgrade if migrate else db.check, stop):
            return
        admission.admit(db, settings, data if own else None)
        app = create_app(db, notifier, blobs, settings, policies, address)
        _Server(app, settings, sock, own, ready, stop).run(sockets=[sock])


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


class _Server(uvicorn.Server):
    """uvicorn that tells when it answers, ends on an event, and lets no long poll hold up its end."""

    def __init__(
        self,
        app: FastAPI,
        settings: RegistrySettings,
        sock: socket.socket,
        own: OwnSocket | None,
        ready: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=guarded(settings, problems.plain),
                limit_concurrency=settings.connections + _REFUSED,
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                proxy_headers=False,  # it would believe whoever is on this machine what they say of a caller
                timeout_keep_alive=int(settings.idle_seconds),
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                ssl_certfile=settings.tls_certificate or None,
                ssl_keyfile=settings.tls_key or None,
            )
        )
        self._context: Context = app.state.context
        self._settings, self._sock, self._ready, self._stop = settings, sock, ready, stop
        self._own = own

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Signals are the process's business: whoever runs the server sets `stop`."""
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            url = self._settings.url or _url(self._settings, self._sock)
            if self._own is not None:
                await self._open_own(self._own, url)
            self._ready(url)

    async def _open_own(self, own: OwnSocket, url: str) -> None:
        """Answer by the socket too, without TLS; and say where, now that both are ours."""

        def protocol() -> asyncio.Protocol:
            made = self.config.http_protocol_class
            return made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)  # type: ignore[call-arg]

        self.servers.append(await asyncio.get_running_loop().create_unix_server(protocol, sock=own.sock))
        own.announce(url, _url(self._settings, self._sock), self._settings.host)

    async def on_tick(self, counter: int) -> bool:
        if self._stop.is_set():
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._own is not None:
            self._own.withdraw()
        self._context.pulse.end()
        await super().shutdown(sockets)


def _url(settings: RegistrySettings, sock: socket.socket) -> str:
    """Where it answers, by the address that it listens on."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_certificate else 'http'}://{host}:{sock.getsockname()[1]}"
