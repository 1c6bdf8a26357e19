"""Send jobs: after the commit, by id, at most for a moment. What could not be sent, the daemon sends later.

Free of torch. A broker that is away costs each sender one short try a second, never a hang, and never a job.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from weighbridge.registry import jobs
from weighbridge.registry.db import Database
from weighbridge.registry.models import Job
from weighbridge.registry.settings import BrokerSettings
from weighbridge.workers.app import TASK, make_app, queue_of

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 1.0
"""After a failure nothing is tried for this long."""
_SHORT: dict[str, Any] = {
    "socket_timeout": 5,
    "retry_on_timeout": False,
    "max_retries": 1,
    "interval_start": 0,
    "interval_step": 0,
    "interval_max": 0,
}
"""Kombu's own patience has no end by default."""
Run = Callable[[int], None]


class Sender(Protocol):
    def publish(self, wanted: Sequence[Job]) -> list[int]:
        """Hand job ids to the broker; return those that it took. Never raises for a broker that is away."""
        ...

    def close(self) -> None: ...


class CelerySender:
    """Sends over Valkey or Redis. Safe to share between threads; open one per process (not across a fork)."""

    def __init__(self, broker: BrokerSettings) -> None:
        self._broker = broker
        self._app = make_app(broker)
        self._app.conf.broker_transport_options = {**self._app.conf.broker_transport_options, **_SHORT}
        self._lock = threading.Lock()
        self._quiet_until = 0.0
        self._away = False

    def publish(self, wanted: Sequence[Job]) -> list[int]:
        if not wanted or time.monotonic() < self._quiet_until:
            return []
        taken: list[int] = []
        with self._lock:
            try:
                self._publish(wanted, taken)
            except (OperationalError, RedisError, OSError) as exc:
                self._failed(exc)
            else:
                self._recovered()
        return taken

    def close(self) -> None:
        """Close the connections."""
        self._app.close()

    def _publish(self, wanted: Iterable[Job], taken: list[int]) -> None:
        with self._app.producer_or_acquire() as producer:
            for job in wanted:
                assert job.id is not None
                self._app.send_task(
                    TASK, args=(job.id,), queue=queue_of(self._broker, job.queue), producer=producer, retry=False
                )
                taken.append(job.id)

    def _failed(self, exc: Exception) -> None:
        self._quiet_until = time.monotonic() + _QUIET_SECONDS
        if not self._away:
            logger.warning("the broker is away, jobs wait in the database: %s", exc)
        self._away = True

    def _recovered(self) -> None:
        if self._away:
            logger.info("the broker is back")
        self._away = False


class InlineSender:
    """Runs jobs in this process, one after the other, in the thread that sends: no broker, for tests and stories."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._waiting: deque[int] = deque()
        self._draining = threading.Lock()

    def publish(self, wanted: Sequence[Job]) -> list[int]:
        ids = [job.id for job in wanted if job.id is not None]
        self._waiting.extend(ids)
        if self._draining.acquire(blocking=False):  # a job that sends jobs does not nest
            try:
                while self._waiting:
                    self.run(self._waiting.popleft())
            finally:
                self._draining.release()
        return ids

    def close(self) -> None: ...


def make_sender(broker: BrokerSettings, run: Run | None = None) -> Sender:
    """Open the sender of a broker; `memory://` needs `run`, which runs a job here. Raises InsecureBroker."""
    if broker.url.get_secret_value().startswith("memory://"):
        if run is None:
            raise ValueError("broker memory://: say what runs the jobs")
        return InlineSender(run)
    return CelerySender(broker)


def send(db: Database, sender: Sender, wanted: Sequence[Job]) -> int:
    """Send due jobs whose insertion is committed; return how many the broker took. The others count as unsent.

    Marked first: one claimed and queued again before its mark would count as sent when it is due the next time.
    """
    ids = [job.id for job in wanted if job.id is not None]
    if not ids:
        return 0
    with db.transaction() as tx:
        jobs.mark_sent(tx, ids)
    taken = sender.publish(wanted)
    if left := sorted(set(ids) - set(taken)):
        with db.transaction() as tx:
            jobs.mark_unsent(tx, left)
    return len(taken)
