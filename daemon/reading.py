"""Reads weights that were written anew, where only their bytes tell whether they are others.

In threads of its own, so that a large checkpoint that somebody touched holds up no other. What is to be read follows
from the registry and the store alone: a daemon that is killed finds it again by its listing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from weighbridge.daemon.layout import Group
from weighbridge.daemon.loops import AWAY, Turning
from weighbridge.storage import identity
from weighbridge.storage.errors import ObjectNotFound, PreconditionFailed, StorageError
from weighbridge.storage.protocols import Check, Get, Ref

log = logging.getLogger(__name__)

_PAUSE = 60.0
Weights = tuple[Ref, ...]


class Readable(Get, Check, Protocol):
    """What reading needs of a store."""


class _Stopped(Exception):
    """The daemon ends."""


class Reading:
    """The loop's body: reads one checkpoint's weights a turn, in any number of threads.

    `done(group)` is called when a digest is there, or the pins to read are no more: then it is looked at again.
    """

    name = "reading"

    def __init__(
        self,
        store: Readable,
        done: Callable[[Group], None] = lambda group: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._done, self._wake = store, done, wake
        self._lock = threading.Lock()
        self._asked: dict[Group, Weights] = {}
        self._in_hand: dict[Group, Weights] = {}
        self._read: dict[Group, tuple[Weights, str]] = {}
        self._failed: dict[Group, str] = {}
        self._just_failed: set[Group] = set()

    def digest(self, group: Group, weights: Weights) -> str | None:
        """The digest of these pinned weights; None: they are going to be read."""
        with self._lock:
            known, digest = self._read.get(group, ((), ""))
            if known == weights:
                return digest
            if group in self._just_failed:
                self._just_failed.discard(group)  # The look that hears of it does not ask again; the next one does.
                return None
            if self._in_hand.get(group) != weights:
                self._asked[group] = weights
        self._wake()
        return None

    def failure(self, group: Group) -> str | None:
        """Why the last try to read the group's weights failed, if it did; it is tried again when they are asked for."""
        with self._lock:
            return self._failed.get(group)

    def forget(self, group: Group) -> None:
        """What the group's weights are is recorded."""
        with self._lock:
            self._asked.pop(group, None)
            self._failed.pop(group, None)
            self._just_failed.discard(group)
            self._read.pop(group, None)

    def once(self, turning: Turning) -> float:
        """Read what was asked for; 0 while there is more. What failed since the store is away stays to be read."""
        with self._lock:
            if not self._asked:
                return _PAUSE
            group, weights = self._asked.popitem()
            self._in_hand[group] = weights
            more = bool(self._asked)
        if more:
            self._wake()  # another thread may read the next one
        try:
            self._take(group, weights, turning)
        except AWAY:
            with self._lock:
                self._asked.setdefault(group, weights)
            raise
        finally:
            with self._lock:
                self._in_hand.pop(group, None)
        return 0.0

    def _take(self, group: Group, weights: Weights, turning: Turning) -> None:
        def progress(_: int) -> None:
            turning.beat()
            if turning.stopping:
                raise _Stopped

        try:
            digest = identity.read(self._store, weights, progress)
        except _Stopped:
            return
        except (PreconditionFailed, ObjectNotFound):
            log.info("%s changed while it was read", group.path)
        except StorageError as error:
            self._store.check()  # raises where it is the whole store's fault; then it stays to be read
            with self._lock:
                self._failed[group] = f"{group.path} cannot be read: {error}"
                self._just_failed.add(group)
        else:
            with self._lock:
                self._failed.pop(group, None)
                self._read[group] = weights, digest
        self._done(group)
