"""The process of an engine child: one loaded variant. It is a fork of the nursery, which has imported everything.

Loading takes processor time that belongs to the children that serve, so the main thread drops to a low priority and
does just that. Requests are answered by a thread that was started before and keeps the normal priority (a process
without privileges can only ever lower it).

It holds no token and opens nothing but its blobs; it ends when its host does, not when the nursery does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from weighbridge.hosts.background import Background, yield_processor

EXPLAIN = signal.SIGUSR1
"""On this signal a child writes to standard error where each of its threads is."""
_FIRST_TO_GO = "500"
"""Where memory ends all the same, the kernel is to take an engine child: it comes back, and its host stays."""


def serve(fd: int, load: Callable[..., Any], host: int, *, body_limit: int, batch: int) -> NoReturn:
    """Be a child: answer on the socket `fd` until it is closed, or the host of the pidfd `host` is gone."""
    from weighbridge.hosts.runner import Runner

    faulthandler.register(EXPLAIN, all_threads=True)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    background = Background()
    runner = Runner(load, background, body_limit=body_limit, batch=batch)

    def answer() -> None:
        try:
            with contextlib.suppress(ConnectionError), socket.socket(fileno=fd) as sock:
                runner.serve(sock)  # a host that is killed resets the connection if it left an answer unread
        finally:  # without this thread the process is of no use, whatever ended it
            yield_processor()  # giving back the memory takes milliseconds too
            os._exit(0)  # nothing to save: skip the interpreter's slow end

    def watch() -> None:
        select.select([host], [], [])
        os._exit(1)  # also in the middle of a computation

    threading.Thread(target=answer, name="answer", daemon=True).start()
    threading.Thread(target=watch, name="watch", daemon=True).start()
    yield_processor()
    background.serve()
    raise AssertionError("the background serves for ever")
