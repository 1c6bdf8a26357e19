"""The heartbeat of a running job: a thread prolongs its lease until the stage ends, time is up, or it is lost."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from weighbridge.registry import jobs
from weighbridge.registry.db import Database
from weighbridge.registry.errors import FencedOut, Unavailable
from weighbridge.registry.jobs import Claim

logger = logging.getLogger(__name__)


class Heartbeat:
    """Renews the claim's lease every third of it, and writes its progress. A context manager around the stage.

    After `limit` seconds it stops by itself, so that a hung stage loses its job to another worker.
    """

    def __init__(self, db: Database, claim: Claim, lease_seconds: float, limit: float) -> None:
        self._db, self._claim, self._lease = db, claim, lease_seconds
        self._until = time.monotonic() + limit
        self._ended = threading.Event()
        self._lost: FencedOut | None = None
        self._progress: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{claim.job_id}", daemon=True)

    def progress(self, share: float) -> None:
        """Note how much is done, 0 to 1. Raises FencedOut when the job is not ours any more: stop the stage."""
        self.check()
        self._progress = share

    def check(self) -> None:
        """Raise FencedOut when the job is not ours any more."""
        if self._lost is not None:
            raise self._lost

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._lease / 3) and time.monotonic() < self._until:
            try:
                with self._db.transaction() as tx:
                    jobs.heartbeat(tx, self._claim, self._lease, self._progress)
            except FencedOut as exc:
                self._lost = exc
                return
            except Unavailable as exc:
                logger.warning("job %s: no heartbeat: %s", self._claim.job_id, exc)
