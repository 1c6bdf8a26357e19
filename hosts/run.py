"""`weighbridge host`: the agent and its HTTP face in one process, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import platform
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import uvloop
from pydantic import SecretStr

from weighbridge.hosts.agent import Agent
from weighbridge.hosts.children import ChildProgram
from weighbridge.hosts.front import Front, listening
from weighbridge.hosts.identity import HostFolder, HostFolderBroken, HostFolderInUse
from weighbridge.hosts.membership import Fenced, Refused
from weighbridge.hosts.router import Slots
from weighbridge.hosts.settings import HostSettings
from weighbridge.registry.client import Client
from weighbridge.registry.settings import RegistrySettings

log = logging.getLogger(__name__)

_BACKLOG = 1024


class CannotListen(OSError):
    """The address is not this machine's, or the port is taken."""


class RunSettings(Protocol):
    """What a host needs of the settings; weighbridge.settings.Settings has them."""

    @property
    def data(self) -> Path: ...
    @property
    def registry(self) -> RegistrySettings: ...
    @property
    def registry_url(self) -> str: ...
    @property
    def host_settings(self) -> HostSettings: ...


def run(settings: RunSettings, *, program: ChildProgram = ChildProgram()) -> int:  # noqa: B008  it is frozen
    """Run until SIGTERM or SIGINT: 0; 1 when fenced by a newer process, refused, or the folder or port is not free."""
    host = settings.host_settings
    gc.collect()
    gc.freeze()  # a full collection would walk over every import for 10 ms and more, in the middle of requests
    try:
        folder = HostFolder(host.data)
        with folder.locked(), _bound(host) as sock:
            uvloop.run(_serve(settings, host, folder, sock, program))
    except (Fenced, Refused, HostFolderInUse, HostFolderBroken, CannotListen) as exc:
        log.error("%s", exc)
        return 1
    return 0


@contextlib.contextmanager
def _bound(host: HostSettings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host.address else socket.AF_INET
    try:
        sock = socket.create_server((host.address, host.port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        raise CannotListen(
            f"cannot listen on {host.address} port {host.port}: {exc.strerror}; set host.address, host.port"
        ) from exc
    with sock:
        yield sock


async def _serve(
    settings: RunSettings, host: HostSettings, folder: HostFolder, sock: socket.socket, program: ChildProgram
) -> None:
    port = sock.getsockname()[1]
    name = host.name or platform.node()
    url = host.url or f"http://{f'[{host.address}]' if ':' in host.address else host.address}:{port}"
    slots = Slots(host.hang_seconds)

    # With a socket in the settings the registry is this user's own: nobody else, at its address, is to get the token.
    data = settings.data if settings.registry.socket is not None else None

    def open_client(token: str | None) -> Client:
        return Client(settings.registry_url, token or _plain(settings.registry.token), data=data)

    holder = Agent(folder, host, slots, open_client, name=name, url=url, program=program)
    agent = asyncio.create_task(holder.run())
    try:
        # The face goes first at the end: what is in flight is answered before the engines go.
        async with listening(Front(slots, host), sock, drain=host.drain_seconds):
            log.info("host %s serves at %s, registry %s", name, url, settings.registry_url)
            await _ended_or_signalled(agent)
    finally:
        agent.cancel()
        await asyncio.wait((agent,))
    if not agent.cancelled():
        agent.result()
    log.info("ended")


async def _ended_or_signalled(task: asyncio.Task[None]) -> None:
    loop, signalled = asyncio.get_running_loop(), asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, signalled.set)
    waiting = asyncio.create_task(signalled.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        for number in numbers:
            loop.remove_signal_handler(number)


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
