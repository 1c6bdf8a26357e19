"""Says in the registry that a daemon is there, and when its bucket cannot be reached: `weighbridge status` shows it."""

from __future__ import annotations

from weighbridge.daemon.loops import Turning
from weighbridge.registry import presence
from weighbridge.registry.db import Database
from weighbridge.registry.notify import Notifier
from weighbridge.storage.errors import StorageError
from weighbridge.storage.protocols import Store


class Reach:
    """The loop's body: asks the store for a sign of life every `seconds`. A store that is away is no failed turn."""

    name = "reach"

    def __init__(self, store: Store, db: Database, notifier: Notifier, owner: str, *, seconds: float = 10.0) -> None:
        self._store, self._db, self._notifier, self._owner, self._seconds = store, db, notifier, owner, seconds

    def once(self, turning: Turning) -> float:
        trouble = ""
        try:
            self._store.check()
        except StorageError as error:
            trouble = str(error)
        with self._db.transaction() as tx:
            news = presence.daemon(tx, self._owner, store=self._store.url, trouble=trouble, seconds=self._seconds)
        if news:
            self._notifier.ring("events")
        return self._seconds
