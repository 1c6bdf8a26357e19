"""Calls that a store may refuse or not know, and that we can do without: said once, and asked for again each time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from weighbridge.storage.errors import AccessDenied, NotSupported, StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

SILENT = 600.0
"""Seconds between two warnings about one call, where some keys of a store allow it and others do not."""


class OptionalCall:
    """One such call of one store. Thread-safe.

    `what` names it, `without` says what is done instead, `permission` the right that it needs (None: none of its own).
    """

    def __init__(
        self,
        store: str,
        what: str,
        *,
        without: str,
        permission: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.without, self.permission = what, without, permission
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._missing: StorageError | None = None
        self._warned = -SILENT

    @property
    def missing(self) -> StorageError | None:
        """Why it was done without the last time; None while it works, or was not asked for."""
        return self._missing

    def __call__(self, call: Callable[[], T], otherwise: Callable[[], T]) -> T:
        """`call()`, or what is done instead where the store refuses or does not know it. Raises what both raise."""
        try:
            answer = call()
        except StorageError as error:
            if not self._is_missing(error):
                raise
            answer = otherwise()  # where this fails too, it was not for want of the call
            self._note(error)
            return answer
        if self._missing is not None:
            self._note(None)
        return answer

    def _is_missing(self, error: StorageError) -> bool:
        """Whether the call itself is not to be had. A plain StorageError is an answer that no store should give."""
        if isinstance(error, AccessDenied):
            return error.permission is not None and self.permission is not None
        return isinstance(error, NotSupported) or type(error) is StorageError

    def _note(self, error: StorageError | None) -> None:
        with self._lock:
            before, self._missing = self._missing, error
            warn = error is not None and before is None and self._clock() - self._warned >= SILENT
            if warn:
                self._warned = self._clock()
        if warn:
            grant = f"; allow {self.permission} to have it" if isinstance(error, AccessDenied) else ""
            log.warning("%s cannot %s (%s): %s%s", self._store, self.what, error, self.without, grant)
        elif error is None and before is not None:
            log.info("%s: can %s again", self._store, self.what)
