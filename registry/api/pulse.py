"""What long polls wait for: one look at the database for everybody who waits, at each ring and each interval."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from sqlalchemy import select
from sqlmodel import col
from starlette.concurrency import run_in_threadpool

from weighbridge.registry import events
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Unavailable
from weighbridge.registry.models import Host
from weighbridge.registry.notify import Notifier

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """One look: the last event's number, and every host's desired revision."""

    seq: int
    revisions: Mapping[str, int]


Condition = Callable[[Seen], bool]


class Pulse:
    """Wakes whoever waits for a condition. Lives in one event loop; costs nothing while nobody waits."""

    def __init__(self, db: Database, notifier: Notifier, poll_seconds: float) -> None:
        self._db, self._notifier, self._poll_seconds = db, notifier, poll_seconds
        self._owner = f"registry-{uuid.uuid4().hex[:12]}"
        self._waiting: dict[asyncio.Future[bool], Condition] = {}
        self._rung, self._wanted = asyncio.Event(), asyncio.Event()
        self._ended = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look and wake while the block runs."""
        loop = asyncio.get_running_loop()

        def heard() -> None:  # In the notifier's thread, perhaps after the loop's end.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._rung.set)

        with self._notifier.listen("events", "hosts", then=heard):
            task = asyncio.create_task(self._run())
            try:
                yield
            finally:
                self.end()
                await task  # Not cancelled: a look under way holds a connection.

    async def wait(self, condition: Condition, seconds: float) -> bool:
        """True as soon as a look meets the condition; False after `seconds`, or when the server ends."""
        if self._ended or seconds <= 0:
            return False
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[future] = condition
        # Whatever changed between the caller's own look and now is seen at once.
        self._rung.set()
        self._wanted.set()
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return False
        finally:
            del self._waiting[future]

    def end(self) -> None:
        """Answer everybody who waits, and make nobody wait any more: the server shuts down."""
        self._ended = True
        self._wanted.set()
        self._rung.set()
        for future in self._waiting:
            if not future.done():
                future.set_result(False)

    async def _run(self) -> None:
        while not self._ended:
            if not self._waiting:
                self._wanted.clear()
                await self._wanted.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._rung.wait(), self._poll_seconds)
            self._rung.clear()
            try:
                seen = await run_in_threadpool(self._look)
            except Unavailable as exc:
                logger.debug("cannot look: %s", exc)
                await asyncio.sleep(self._poll_seconds)
                continue
            except Exception:  # Our own mistake; but whoever waits is better served late than never.
                logger.exception("cannot look")
                await asyncio.sleep(self._poll_seconds)
                continue
            for future, condition in self._waiting.items():
                if not future.done() and condition(seen):
                    future.set_result(True)

    def sequence(self) -> None:
        """Number what is committed: a reader need not wait for the daemon's turn, nor for a daemon."""
        if events.sequence(self._db, self._owner):
            self._notifier.ring("events")

    def _look(self) -> Seen:
        self.sequence()
        with self._db.read() as tx:
            rows = tx.execute(select(col(Host.id), col(Host.desired_revision)))
            return Seen(events.last(tx), {row[0]: row[1] for row in rows})
