"""A supervised child process: its own group, a log file, restarts with growing pauses, no orphan."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

RESTART_FIRST, RESTART_MAX = 0.5, 10.0
"""Seconds before a child that died is started again: the first time, and at most (doubled each time)."""
SETTLED = 30.0
"""A child that lived this long (s) starts with the first pause again."""
ROTATE = 10 << 20
"""Bytes of a log above which it is put aside when the child starts."""
_TAIL = 4096
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Child:
    """One command, kept running between `start` and `stop`. For a single-threaded supervisor.

    The kernel sends the child SIGTERM when this process dies, however it does.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_file: Path,
        *,
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.log_file = name, log_file
        self._command, self._environment, self._clock = list(command), environment, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._pause, self._again = 0.0, 0.0, 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Raises OSError where the command cannot be run."""
        if self.log_file.exists() and self.log_file.stat().st_size > ROTATE:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                # Its own group: a terminal's Ctrl-C reaches only the supervisor, which ends everything in order.
                start_new_session=True,
                preexec_fn=_end_with(os.getpid()),
            )
        self._started = self._clock()

    def keep(self) -> float | None:
        """Start it again when it died and its pause is over; return when to call again, None while it runs."""
        now = self._clock()
        if self.running:
            return None
        if self._process is not None:
            self._mourn(now)
        if now < self._again:
            return self._again
        self.start()
        return None

    def ask_to_end(self) -> None:
        if self.running and self._process is not None:
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Wait for its end until the clock says `deadline`; then kill it, and in any case what is left of its group."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline - self._clock()))
        except subprocess.TimeoutExpired:
            log.warning("%s did not end in time: killed", self.name)
        self._kill_group()
        self._process.wait()

    def _mourn(self, now: float) -> None:
        """Say why it died, kill what it left behind, and set the pause."""
        assert self._process is not None
        self._kill_group()
        settled = now - self._started >= SETTLED
        self._pause = RESTART_FIRST if settled or not self._pause else min(self._pause * 2, RESTART_MAX)
        self._again = now + self._pause
        log.warning(
            "%s ended (%s) and is started again in %.1f s; the end of %s:\n%s",
            self.name,
            _how(self._process.returncode),
            self._pause,
            self.log_file,
            self.tail() or "(empty)",
        )
        self._process = None

    def tail(self, lines: int = 12) -> str:
        """The last lines of its log."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, self.log_file.stat().st_size - _TAIL))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(cannot be read: {error.strerror})"

    def _kill_group(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _end_with(parent: int) -> Callable[[], None]:
    """What the child does before it runs the command: ask the kernel for SIGTERM when its parent dies."""

    def prepare() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
