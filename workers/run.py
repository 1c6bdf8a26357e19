"""`weighbridge worker`: one small process that keeps its Celery processes alive and ends them in order.

Rollout steps (`control`) have a process of their own, without torch, so that a roll back never queues behind a
validation; variants and `gpu` each have one at low priority, so that a new checkpoint never waits for a compression. A
Celery process exits when its broker dies under it; it is started again, and waits for what is away.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Protocol

from pydantic import SecretStr

from weighbridge.registry.db import Database
from weighbridge.registry.recipe import Policy
from weighbridge.registry.settings import BrokerSettings
from weighbridge.storage.settings import StorageSettings
from weighbridge.workers.app import check_broker
from weighbridge.workers.confined.kept import Nursery
from weighbridge.workers.settings import WorkerSettings
from weighbridge.workers.tasks import Stages

logger = logging.getLogger(__name__)

_RESTART_SECONDS = 1.0
_LAST_WORD = 5.0
"""Seconds that a killed group may take to be gone."""
_PR_SET_PDEATHSIG = 1


class RunSettings(Protocol):
    """What a worker needs of the settings."""

    @property
    def storage(self) -> StorageSettings: ...
    @property
    def broker(self) -> BrokerSettings: ...
    @property
    def database_url(self) -> SecretStr: ...
    @property
    def worker_settings(self) -> WorkerSettings: ...
    @property
    def policies(self) -> tuple[Policy, ...]: ...


OpenStages = Callable[[Database, RunSettings], Stages]


@dataclass(frozen=True)
class TorchStages:
    """Opens the real stages, which run in children of the nursery behind `orders`; imports torch."""

    orders: socket.socket

    def __call__(self, db: Database, settings: RunSettings) -> Stages:
        from weighbridge.workers.stages import open_stages

        return open_stages(db, settings, self.orders)


def run(settings: RunSettings, *, stages: OpenStages | None = None) -> int:
    """Run until SIGTERM or SIGINT; return the exit status. `stages` None: the real ones. Raises InsecureBroker."""
    check_broker(settings.broker)
    if stages is not None:
        return _run(settings, stages, lambda: None)
    with Nursery() as nursery:
        return _run(settings, TorchStages(nursery.orders), nursery.keep)


def _run(settings: RunSettings, stages: OpenStages, keep: Callable[[], None]) -> int:
    crew = [Member(settings, queues, stages) for queues in _processes(settings.worker_settings.queues)]
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    ended: list[int] = []

    def end(number: int, _: object) -> None:
        ended.append(number)
        os.write(wake, b"x")

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not ended:
            keep()
            for member in crew:
                member.keep()
            wait([woken, *(member.sentinel for member in crew if member.running)], timeout=_RESTART_SECONDS)
        _shut_down(crew, settings.worker_settings.shutdown_seconds)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(woken)
        os.close(wake)
    return 0


def _processes(queues: Sequence[str]) -> list[tuple[str, ...]]:
    """Which queues share a process: none do. Each has its own patience, priority and imports."""
    return [(queue,) for queue in dict.fromkeys(queues)]


@dataclass
class Member:
    """One Celery process of the crew, started again when it ends by itself."""

    settings: RunSettings
    queues: tuple[str, ...]
    stages: OpenStages
    _process: BaseProcess | None = field(default=None, init=False)
    _not_before: float = field(default=0.0, init=False)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    @property
    def sentinel(self) -> int:
        assert self._process is not None
        return self._process.sentinel

    def keep(self) -> None:
        """Start it where it does not run, at most once a second."""
        if self.running or time.monotonic() < self._not_before:
            return
        if self._process is not None:
            logger.warning("worker for %s ended (%s): starting it again", self._name, self._process.exitcode)
            self._process.close()
        self._not_before = time.monotonic() + _RESTART_SECONDS
        # This process has one thread and has opened nothing: a fork is safe, and saves a second of imports.
        target = multiprocessing.get_context("fork").Process(target=self._main, name=f"weighbridge-{self._name}")
        target.start()
        self._process = target

    def signal(self, number: int) -> None:
        """Signal the process; SIGKILL reaches its children too."""
        if self._process is None or self._process.pid is None or not self.running:
            return
        if number == signal.SIGKILL:
            os.killpg(self._process.pid, number)
        else:
            os.kill(self._process.pid, number)

    def join(self, timeout: float) -> bool:
        """Wait for its end; say whether it came."""
        if self._process is None:
            return True
        self._process.join(max(0.0, timeout))
        return not self._process.is_alive()

    @property
    def _name(self) -> str:
        return "+".join(self.queues)

    def _main(self) -> None:
        parent = os.getppid()
        os.setpgid(0, 0)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Celery talks on stdout, which is not ours to fill
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        _end_with_parent(parent)
        from weighbridge.workers.celery_process import work

        owner = f"{socket.gethostname()}:{os.getpid()}"
        sys.exit(work(self.settings, self.queues, self.stages, owner))


def _shut_down(crew: Sequence[Member], seconds: float) -> None:
    """Running jobs get `seconds`; then their processes are killed, and their leases bring the jobs back."""
    logger.info("worker: shutting down, running jobs get %g s", seconds)
    for member in crew:
        member.signal(signal.SIGTERM)
    deadline = time.monotonic() + seconds
    for member in crew:
        if not member.join(deadline - time.monotonic()):
            logger.warning("worker: a job still runs after %g s, killing it", seconds)
            member.signal(signal.SIGKILL)
            member.join(_LAST_WORD)


def _end_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
