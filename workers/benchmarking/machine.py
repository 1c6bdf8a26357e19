"""The lease of a machine: many ordinary jobs, or one benchmark alone. Kernel locks, so that a crash releases them.

`turnstile` is held by whoever is about to enter: a benchmark keeps it until those inside have left, so that no stream
of jobs starves it; a job keeps it while the benchmark finishes, and says by `waiting` that the benchmark should.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from weighbridge.workers.ours import OwnFailure

_POLL = 0.02
"""Seconds between two looks. Blocking in the kernel would keep a process from telling that it still waits."""

Waiting = Callable[[], None]
"""Called over and over while the machine is not free yet; what it raises ends the wait."""


def _silently() -> None:
    pass


class UnsafeLocks(OwnFailure):
    """The folder of the locks is not ours alone; the message names it and what to do."""


class Machine:
    """The lease of the machine that `folder` stands for; every process that names the same folder shares it.

    Not reentrant: a benchmark inside `working` would wait for itself.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` None: one of this user's own. What others may write to is refused: they could hold up every job."""
        self._folder = folder or own_folder()

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
        """A descriptor for reading is enough to lock by. Raises UnsafeLocks, OSError: both are ours, and no verdict."""
        with suppress(FileExistsError):
            self._folder.mkdir(mode=0o700, parents=True)
        _check(self._folder)
        path = self._folder / f"{name}.lock"
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            return os.open(path, flags | os.O_CREAT, 0o600)


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


def own_folder(otherwise: Path | None = None) -> Path:
    """This user's: in XDG_RUNTIME_DIR, which nobody else can enter, else `otherwise`.

    Commands that have no data folder to name have one among the temporary files, which is refused where it is not ours.

    Two users of one machine have two, and their benchmarks do not keep out of each other's way: the measurements say so
    by being contended. An operator who wants them to share names one folder, of root's, in `worker.machine`.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        return Path(runtime) / "weighbridge-machine"
    return otherwise or Path(tempfile.gettempdir()) / f"weighbridge-machine-{os.getuid()}"


def _check(folder: Path) -> None:
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode):
        raise UnsafeLocks(f"worker.machine: {folder} is no folder: remove it, or name another one")
    if seen.st_uid not in (os.getuid(), 0) or seen.st_mode & stat.S_IWOTH:
        raise UnsafeLocks(
            f"worker.machine: {folder} belongs to somebody else, or everybody may write to it, and who does could hold "
            "up every job: remove it, or name another one"
        )


def _try(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
