"""Blocking calls that may outlast whoever asked: nobody waits for them when the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def in_daemon_thread(call: Callable[[], T]) -> T:
    """As asyncio.to_thread, in a thread of its own that the interpreter does not wait for at its end."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def tell(deliver: Callable[[Any], None], what: object) -> None:
        if not answer.done():
            deliver(what)

    def work() -> None:
        try:
            result: object = call()
            deliver: Callable[[Any], None] = answer.set_result
        except BaseException as exc:  # handed over, not swallowed
            result, deliver = exc, answer.set_exception
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(tell, deliver, result)

    threading.Thread(target=work, name="call", daemon=True).start()
    return await answer
