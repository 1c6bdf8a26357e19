"""`weighbridge host`: the agent and its HTTP face in one process, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import signal
import socket
from collections.abc import Iterator
from typing import Protocol

import uvloop
from pydantic import SecretStr

from weighbridge.hosts.agent import Agent, Fenced, Refused
from weighbridge.hosts.front import Front, listening
from weighbridge.hosts.identity import HostFolder, HostFolderInUse
from weighbridge.hosts.router import Slots
from weighbridge.hosts.settings import HostSettings
from weighbridge.registry.client import Client
from weighbridge.registry.settings import RegistrySettings

log = logging.getLogger(__name__)

_BACKLOG = 1024


class RunSettings(Protocol):
    """What a host needs of the settings; weighbridge.settings.Settings has them."""

    @property
    def registry(self) -> RegistrySettings: ...
    @property
    def registry_url(self) -> str: ...
    @property
    def host_settings(self) -> HostSettings: ...


def run(settings: RunSettings) -> int:
    """Run until SIGTERM or SIGINT: 0; 1 when fenced by a newer process, refused, or the folder or port is taken."""
    host = settings.host_settings
    folder = HostFolder(host.data)
    try:
        with folder.locked(), _bound(host) as sock:
            uvloop.run(_serve(settings, host, folder, sock))
    except (Fenced, Refused, HostFolderInUse) as exc:
        log.error("%s", exc)
        return 1
    except OSError as exc:
        log.error("cannot listen on %s port %d: %s; set host.address, host.port", host.address, host.port, exc.strerror)
        return 1
    return 0


@contextlib.contextmanager
def _bound(host: HostSettings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host.address else socket.AF_INET
    with socket.create_server((host.address, host.port), family=family, backlog=_BACKLOG) as sock:
        yield sock


async def _serve(settings: RunSettings, host: HostSettings, folder: HostFolder, sock: socket.socket) -> None:
    port = sock.getsockname()[1]
    name = host.name or platform.node()
    url = host.url or f"http://{f'[{host.address}]' if ':' in host.address else host.address}:{port}"
    slots = Slots()

    def open_client(token: str | None) -> Client:
        return Client(settings.registry_url, token or _plain(settings.registry.token))

    async with listening(Front(slots, host), sock, drain=host.drain_seconds):
        log.info("host %s serves at %s, registry %s", name, url, settings.registry_url)
        agent = asyncio.create_task(Agent(folder, host, slots, open_client, name=name, url=url).run())
        with _ended_by_signals(agent), contextlib.suppress(asyncio.CancelledError):
            await agent
    log.info("ended")


@contextlib.contextmanager
def _ended_by_signals(task: asyncio.Task[None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
