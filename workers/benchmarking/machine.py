"""The lease of a machine: many ordinary jobs, or one benchmark alone. Kernel locks, so that a crash releases them.

`turnstile` is held by whoever is about to enter: a benchmark keeps it until those inside have left, so that no stream
of jobs starves it; a job keeps it while the benchmark finishes, and says by `waiting` that the benchmark should.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_POLL = 0.02
"""Seconds between two looks. Blocking in the kernel would keep a process from telling that it still waits."""

Waiting = Callable[[], None]
"""Called over and over while the machine is not free yet; what it raises ends the wait."""


def _silently() -> None:
    pass


class Machine:
    """The lease of the machine that `folder` stands for; every process that names the same folder shares it.

    Not reentrant: a benchmark inside `working` would wait for itself.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir()) / "weighbridge-machine"

    @contextmanager
    def working(self, waiting: Waiting = _silently) -> Iterator[None]:
        """Do an ordinary job, beside others; waits while a benchmark measures."""
        with ExitStack() as inside:
            with self._held("waiting", fcntl.LOCK_SH, waiting), self._held("turnstile", fcntl.LOCK_EX, waiting):
                inside.enter_context(self._held("work", fcntl.LOCK_SH, waiting))
            yield

    @contextmanager
    def alone(self, waiting: Waiting = _silently) -> Iterator[Alone]:
        """Measure, with no ordinary job and no other benchmark on the machine."""
        lease = Alone(self, waiting)
        try:
            lease.enter()
            yield lease
        finally:
            lease.leave()

    def wanted(self) -> bool:
        """Whether an ordinary job waits to enter."""
        descriptor = self._open("waiting")
        try:
            return not _try(descriptor, fcntl.LOCK_EX)
        finally:
            os.close(descriptor)

    @contextmanager
    def exclusively(self, waiting: Waiting) -> Iterator[None]:
        """What `alone` is made of: the machine without others, until the block ends."""
        with ExitStack() as inside:
            with self._held("turnstile", fcntl.LOCK_EX, waiting):
                inside.enter_context(self._held("work", fcntl.LOCK_EX, waiting))
            yield

    @contextmanager
    def _held(self, name: str, how: int, waiting: Waiting) -> Iterator[None]:
        descriptor = self._open(name)
        try:
            while not _try(descriptor, how):
                waiting()
                time.sleep(_POLL)
            yield
        finally:
            os.close(descriptor)  # which releases the lock

    def _open(self, name: str) -> int:
        """A descriptor for reading is enough to lock by: other users' processes share the files as they are."""
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.chmod(0o1777)
        path = self._folder / f"{name}.lock"
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags)
        except FileNotFoundError:  # O_CREAT on another user's file is refused in a sticky folder: only where none is
            return os.open(path, flags | os.O_CREAT, 0o644)


class Alone:
    """The machine to oneself."""

    def __init__(self, machine: Machine, waiting: Waiting) -> None:
        self._machine, self._waiting, self._inside = machine, waiting, ExitStack()

    def wanted(self) -> bool:
        """Whether an ordinary job waits for this benchmark to give way."""
        return self._machine.wanted()

    def give_way(self) -> None:
        """Let those that wait work, and come back when they have left."""
        self.leave()
        self.enter()

    def enter(self) -> None:
        self._inside.enter_context(self._machine.exclusively(self._waiting))

    def leave(self) -> None:
        self._inside.close()


def _try(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
