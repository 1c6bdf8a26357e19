"""The process that confined children are forked from: `python -m weighbridge.workers.confined.nursery --fd N`.

It imported torch before it was asked anything, so a child is there in milliseconds; it was started with a scrubbed
environment and one socket, so a child has no secret to find. One nursery serves every process of a worker.

An order is one packet with two descriptors: the child's end of a socket pair, and a pipe for how it ended: its wait
status, its most memory and its processor time, as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import select
import signal
import socket

_PR_SET_PDEATHSIG = 1
_ORDER = 16
"""Bytes of a packet: there is nothing in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket that orders come from")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the worker's to handle
    from weighbridge.workers.confined import child

    child.warm()
    with socket.socket(fileno=arguments.fd) as orders:
        Nursery(orders).serve()


class Nursery:
    """Forks on order, and tells who ordered a child how it ended."""

    def __init__(self, orders: socket.socket) -> None:
        self._orders, self._poll = orders, select.poll()
        self._poll.register(orders, select.POLLIN)
        self._running: dict[int, tuple[int, int]] = {}
        """By pidfd: the child's id, and the pipe for its end."""

    def serve(self) -> None:
        """Until nobody can order any more."""
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._running:
                    self._bury(descriptor)
                elif not self._order():
                    return

    def _order(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._orders, _ORDER, 2)
        if not data:
            return False
        if len(descriptors) != 2:
            for descriptor in descriptors:
                os.close(descriptor)
            return True
        theirs, told = descriptors
        pid = os.fork()
        if pid == 0:
            self._become(theirs, told)
        os.close(theirs)
        watched = os.pidfd_open(pid)
        self._running[watched] = (pid, told)
        self._poll.register(watched, select.POLLIN)
        return True

    def _become(self, theirs: int, told: int) -> None:
        """Be a child, which has its own socket and nothing of the others'."""
        from weighbridge.workers.confined import child

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._orders.close()
        os.close(told)
        for watched, (_, pipe) in self._running.items():
            os.close(watched)
            os.close(pipe)
        child.serve(theirs)

    def _bury(self, watched: int) -> None:
        self._poll.unregister(watched)
        os.close(watched)
        pid, told = self._running.pop(watched)
        _, status, usage = os.wait4(pid, 0)
        end = {"status": status, "bytes": usage.ru_maxrss << 10, "seconds": usage.ru_utime + usage.ru_stime}
        try:
            os.write(told, json.dumps(end).encode())
        except BrokenPipeError:
            pass  # who ordered it is gone
        finally:
            os.close(told)


if __name__ == "__main__":
    main()
