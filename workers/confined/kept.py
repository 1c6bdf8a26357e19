"""The nursery as the worker's supervisor keeps it: started, and started again when it ends."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time

from weighbridge.workers.confined.environment import scrubbed

logger = logging.getLogger(__name__)

_RESTART_SECONDS = 1.0
_STDERR = 2


class Nursery:
    """A context manager. `orders` is for every process forked from here; it outlives the nursery's own deaths.

    Both ends of it stay open here: an order that a nursery did not come to is the next one's.
    """

    def __init__(self) -> None:
        self.orders, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0

    @property
    def pid(self) -> int:
        assert self._process is not None, "it is entered"
        return self._process.pid

    def keep(self) -> None:
        """Start it where it does not run, at most once a second."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() < self._not_before:
            return
        if self._process is not None:
            logger.warning("the nursery ended (%s): starting it again", self._process.returncode)
        self._not_before = time.monotonic() + _RESTART_SECONDS
        fd = self._theirs.fileno()
        command = [sys.executable, "-m", "weighbridge.workers.confined.nursery", "--fd", str(fd)]
        self._process = subprocess.Popen(
            command, pass_fds=(fd,), stdin=subprocess.DEVNULL, stdout=_STDERR, env=scrubbed(threads=1)
        )

    def __enter__(self) -> Nursery:
        self.keep()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()  # its children end with it; it has nothing to save
            self._process.wait()
        self.orders.close()
        self._theirs.close()
