"""Whether a process that was given work is at it, seen from outside: which it cannot say itself.

A child that loads is silent for as long as the load takes, which may be minutes; so is one that computes a long
request. One that is stuck (a lock that its fork inherited, a storage that never answers) is just as silent, but it
neither computes nor reads.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

_RUNNING, _IN_KERNEL = "R", "D"
"""States of a thread in /proc: computing or waiting for a processor; waiting for a disk or a device."""
_STATE, _USER, _SYSTEM = 0, 11, 12
"""Fields of /proc/PID/task/TID/stat behind the command's name (proc_pid_stat(5), where they are 3, 14 and 15)."""


class _Sample(NamedTuple):
    busy: bool
    ticks: int
    """Processor time of all threads, clock ticks."""
    read: int
    """Bytes that were read, from the page cache too."""


class Activity:
    """Watches the process `pid` from the moment `now` on (seconds of a monotonic clock)."""

    def __init__(self, pid: int, now: float) -> None:
        self._process = Path(f"/proc/{pid}")
        self._last, self._since = self._sample(), now

    def idle_for(self, now: float) -> float:
        """Seconds since it was last seen at work; a process that waits for a processor or a disk is at work."""
        sample = self._sample()
        if sample.busy or sample != self._last:
            self._last, self._since = sample, now
        return now - self._since

    def _sample(self) -> _Sample:
        busy, ticks, read = False, 0, 0
        with contextlib.suppress(OSError):  # it has ended, or a thread has: whoever waits for it hears of that
            for thread in (self._process / "task").iterdir():
                fields = (thread / "stat").read_text().rpartition(")")[2].split()
                busy = busy or fields[_STATE] in (_RUNNING, _IN_KERNEL)
                ticks += int(fields[_USER]) + int(fields[_SYSTEM])
            read = int((self._process / "io").read_text().split(maxsplit=2)[1])
        return _Sample(busy, ticks, read)
