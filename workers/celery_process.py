"""One Celery process: waits until broker and database answer, then takes job ids from its queues.

Stages run in a pool of child processes, each with torch loaded before its first job; rollout steps run in this process
itself.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import tenacity
from celery import Celery
from celery.exceptions import SecurityWarning
from celery.platforms import EX_UNAVAILABLE
from celery.signals import worker_process_init, worker_process_shutdown
from celery.worker import state as worker_state
from celery.worker.request import Request
from kombu.asynchronous import get_event_loop
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from weighbridge.engines.hardware import Hardware, describe
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Unavailable
from weighbridge.registry.lifecycle import kind_queue
from weighbridge.registry.notify import open_notifier
from weighbridge.workers import broker_transport
from weighbridge.workers.app import TASK, make_app, queue_name
from weighbridge.workers.presence import Presence, capable
from weighbridge.workers.queue import make_sender
from weighbridge.workers.settings import WorkerSettings
from weighbridge.workers.tasks import Stages, Worker

if TYPE_CHECKING:
    from weighbridge.workers.run import OpenStages, RunSettings

logger = logging.getLogger(__name__)

_VARIANT_WORK = frozenset({"variants", "gpu"})
_ACK_SECONDS = 1.0
_PATIENCE = 0.5
"""Seconds between two tries of a broker or database that is away."""


def work(settings: RunSettings, queues: Sequence[str], stages: OpenStages, owner: str) -> int:
    """Take jobs until SIGTERM (running ones are finished) or until the broker dies; return the exit status."""
    worker_settings = settings.worker_settings
    hardware = _hardware(queues, worker_settings)
    kinds = (kind_queue(hardware.kind),) if hardware is not None else ()
    broker_transport.install()
    app = make_app(settings.broker, worker_settings, kinds)
    _until_there("database", lambda: _check_database(settings))
    _until_there("broker", lambda: _check_broker(app))
    process = _Process(settings, stages, owner, (*queues, *kinds), hardware)
    app.task(name=TASK, Request=_Request)(process.run_job)
    pooled = tuple(queues) != ("control",)
    if pooled:
        worker_process_init.connect(process.open, weak=False)
        worker_process_shutdown.connect(process.close, weak=False)
        process.preload()
    else:
        process.open(control=True)
    # Messages are JSON job ids, and nothing here unpickles: a container's root is no more dangerous than elsewhere.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    logger.info("worker: taking jobs of %s", ", ".join(queues))
    worker = app.Worker(
        hostname=f"{'+'.join(queues)}@{owner}",
        queues=[queue_name(settings.broker, queue) for queue in (*queues, *kinds)],
        pool="prefork" if pooled else "solo",
        concurrency=_concurrency(queues, worker_settings),
        without_mingle=True,
        without_gossip=True,
        quiet=True,
    )
    worker.start()
    process.close()
    return int(worker.exitcode or 0)


def _concurrency(queues: Sequence[str], worker: WorkerSettings) -> int:
    if tuple(queues) == ("control",):
        return 1
    return worker.variant_jobs if _VARIANT_WORK & set(queues) else worker.concurrency


def _hardware(queues: Sequence[str], worker: WorkerSettings) -> Hardware | None:
    """What the queue of this machine's kind is named after; None where no variant's work is taken.

    A worker for a device that is not there does not start, with the words of what is missing.
    """
    return describe(worker.device) if _VARIANT_WORK & set(queues) else None


class _Process:
    """What one process of the pool holds open between jobs. Opened after the fork, never before."""

    def __init__(
        self, settings: RunSettings, stages: OpenStages, owner: str, queues: Sequence[str], hardware: Hardware | None
    ) -> None:
        self._settings, self._stages, self._owner = settings, stages, owner
        self._queues, self._hardware = tuple(queues), hardware
        self._worker: Worker | None = None
        self._presence: Presence | None = None

    def preload(self) -> None:
        """Import what the real stages need once, in the parent: the pool's processes have it at once.

        Out of the collector's sight for good: each later collection would walk it.
        """
        from weighbridge.workers.run import TorchStages

        if isinstance(self._stages, TorchStages):
            import_module("weighbridge.workers.stages")
            gc.collect()
            gc.freeze()

    def open(self, *, control: bool = False, **_: Any) -> None:
        settings, db = self._settings, Database(self._settings.database_url)
        self._worker = Worker(
            db=db,
            notifier=open_notifier(settings.broker.url, settings.broker.channel),
            stages=_NoStages() if control else self._stages(db, settings),
            settings=settings.worker_settings,
            owner=f"{self._owner}:{os.getpid()}",
            policies=settings.policies,
            sender=make_sender(settings.broker),
            capable=capable(self._hardware),
        )
        if self._hardware is not None:
            self._presence = Presence(db, self._owner, self._queues, self._hardware)
            self._presence.start()

    def close(self, **_: Any) -> None:
        if self._presence is not None:
            self._presence.stop()
            self._presence = None
        if (worker := self._worker) is not None:
            self._worker = None
            if worker.sender is not None:
                worker.sender.close()
            worker.notifier.close()
            worker.db.close()

    def run_job(self, job_id: object = None, *_: object, **__: object) -> None:
        """The task body."""
        assert self._worker is not None, "the pool's process was opened by worker_process_init"
        self._worker.run_job(job_id)


class _Request(Request):  # type: ignore[misc]
    """A message whose acknowledgement was lost fills the prefetch for ever: the consumer would hear nothing any more.

    (Seen with Celery 5.7 when the broker dies while a job runs and is back before the consumer notices.)
    """

    def acknowledge(self) -> None:
        super().acknowledge()
        loop = get_event_loop()  # which acknowledges in its next turn
        if loop is None:
            self._end_when_deaf()
        else:
            loop.call_later(_ACK_SECONDS, self._end_when_deaf)  # type: ignore[no-untyped-call]

    def _end_when_deaf(self) -> None:
        if not self.message.acknowledged and worker_state.should_stop is None:
            logger.warning("worker: the broker lost an acknowledgement: ending, to connect anew")
            worker_state.should_stop = EX_UNAVAILABLE  # running jobs end first; the supervisor starts it again


class _NoStages(Stages):
    """The control process runs rollout steps only."""

    def run(self, claim: Any, heartbeat: Any) -> Any:
        raise RuntimeError(f"job {claim.job_id}: stage {claim.stage} arrived on the control queue")


def _until_there(what: str, check: Callable[[], None]) -> None:
    """Wait for a part that is away, saying so every ten seconds."""
    said = 0

    def say(state: tenacity.RetryCallState) -> None:
        nonlocal said
        if state.seconds_since_start is not None and state.seconds_since_start >= said * 10:
            said += 1
            outcome = state.outcome.exception() if state.outcome else None
            logger.warning("worker: waiting for the %s: %s", what, outcome)

    tenacity.Retrying(
        retry=tenacity.retry_if_exception_type((Unavailable, OperationalError, RedisError, OSError)),
        wait=tenacity.wait_fixed(_PATIENCE),
        before_sleep=say,
    )(check)


def _check_database(settings: RunSettings) -> None:
    database = Database(settings.database_url)
    try:
        database.check()
    finally:
        database.close()


def _check_broker(app: Celery) -> None:
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
