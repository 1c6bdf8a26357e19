"""Tells the registry, now and then, what this worker can do: what needs a device goes only where one is."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from weighbridge.engines.hardware import Hardware
from weighbridge.registry import workers_seen
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Unavailable

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""Between two words; a worker that was silent for four of these counts as gone."""


def capable(hardware: Hardware | None) -> Mapping[str, Any] | None:
    """What `jobs.claim` compares a job's needs with; None where no job needs anything."""
    if hardware is None:
        return None
    return {"device": hardware.device, "kind": hardware.kind, "memory": hardware.memory_bytes}


class Presence:
    """A thread that says so every `SECONDS`, until `stop`."""

    def __init__(self, db: Database, owner: str, queues: Sequence[str], hardware: Hardware) -> None:
        self._db, self._owner, self._queues, self._hardware = db, owner, tuple(queues), hardware
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                with self._db.transaction() as tx:
                    workers_seen.seen(
                        tx,
                        owner=self._owner,
                        machine=socket.gethostname(),
                        queues=self._queues,
                        kind=self._hardware.kind,
                        hardware=self._hardware.model_dump(mode="json"),
                    )
            except Unavailable as exc:
                logger.warning("worker %s: cannot say what it can do: %s", self._owner, exc)
            if self._ended.wait(SECONDS):
                return self._goodbye()

    def _goodbye(self) -> None:
        with contextlib.suppress(Unavailable), self._db.transaction() as tx:
            workers_seen.gone(tx, self._owner)
