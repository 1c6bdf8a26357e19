"""The process that engine children are forked from: `python -m weighbridge.hosts.nursery --fd N`.

Importing torch takes two seconds of a processor, which a host under load does not have when the next version comes.
So it is done once, here; a fork of this process is a warm spare in milliseconds, and shares the imports' memory.
Nothing else happens here: no artifact is loaded, no device is touched (a CUDA context does not survive a fork).

An order is one byte with the child's end of its socket pair; the answer is the child's process id, 8 bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from weighbridge.hosts import child
from weighbridge.hosts.background import yield_processor

_PR_SET_PDEATHSIG = 1
PID_BYTES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the inherited end of the parent's socket pair")
    parser.add_argument("--engine", required=True, help="module:function that loads an artifact")
    parser.add_argument("--preload", default="", help="module:function to call before the first fork")
    parser.add_argument("--body-limit", type=int, required=True, help="bytes a body may decompress to")
    parser.add_argument("--batch", type=int, default=1, help="rows of waiting requests to compute as one")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    host = os.pidfd_open(os.getppid())
    load = _imported(arguments)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps; the host watches its children itself
    with socket.socket(fileno=arguments.fd) as orders:
        while (theirs := _order(orders)) is not None:
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                orders.close()
                child.serve(theirs, load, host, body_limit=arguments.body_limit, batch=arguments.batch)
            os.close(theirs)
            orders.sendall(pid.to_bytes(PID_BYTES, "little"))


def _imported(arguments: argparse.Namespace) -> Callable[..., Any]:
    """Import everything, in a thread of low priority that is gone before the first fork.

    The main thread keeps its own priority for the forks: a process without privileges can only ever lower it.
    """
    found: list[Callable[..., Any]] = []

    def work() -> None:
        yield_processor()
        import_module("weighbridge.hosts.runner")
        if arguments.preload:
            _named(arguments.preload)()
        found.append(_named(arguments.engine))

    thread = threading.Thread(target=work, name="import")
    thread.start()
    thread.join()
    _wait_for_exit(thread)
    return found[0]


def _wait_for_exit(thread: threading.Thread) -> None:
    """Wait until the kernel's thread has ended too: `join` returns when its Python has.

    What it still frees then, it frees under locks of C libraries; a fork would inherit them locked, for ever.
    """
    left = Path(f"/proc/self/task/{thread.native_id}")
    while left.exists():
        time.sleep(0.001)  # the kernel has no event for the end of a thread of one's own


def _named(reference: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _order(orders: socket.socket) -> int | None:
    data, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
    return descriptors[0] if data else None


if __name__ == "__main__":
    main()
