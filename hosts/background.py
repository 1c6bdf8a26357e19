"""Work that must yield the processor to every child that serves."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
LOADING_PRIORITY = 10
"""Niceness of loading: about a tenth of a busy processor. At 19 a load on a machine that stays busy never ends."""


def yield_processor() -> None:
    """Give the calling thread a low priority. On Linux it is the thread's own, and there is no way back up."""
    os.setpriority(os.PRIO_PROCESS, 0, LOADING_PRIORITY)


class Background:
    """One thread's queue of work; another thread asks and waits."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()

    def run(self, work: Callable[[], T]) -> T:
        """Have `work` done by the thread that is in `serve`; its result, or its exception."""
        future: Future[T] = Future()
        self._queue.put((work, future))
        return future.result()

    def serve(self) -> None:
        """Do what is asked, for ever."""
        while True:
            work, future = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as exc:  # it is the asker's
                future.set_exception(exc)
