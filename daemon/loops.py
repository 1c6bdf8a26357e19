"""One supervised thread per loop: it turns when woken or when it asked to, survives errors, and says how it fares."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from weighbridge.registry.errors import Unavailable
from weighbridge.storage.errors import AccessDenied, BucketNotFound, StorageUnavailable

log = logging.getLogger(__name__)

AWAY = (Unavailable, StorageUnavailable, AccessDenied, BucketNotFound)
"""A part that is away, which is no fault of ours: said in one line, without a traceback."""
BACKOFF_FIRST, BACKOFF_MAX = 0.5, 10.0
"""Seconds before a failed turn is tried again: the first time, and at most (doubled each time)."""


class Turning(Protocol):
    """What a turn is told, and tells, while it runs."""

    @property
    def stopping(self) -> bool:
        """True when the daemon ends: leave at the next good place."""
        ...

    def beat(self) -> None:
        """Say that a long turn is getting on."""
        ...


class Step(Protocol):
    """A loop's body, which tests call without a thread."""

    @property
    def name(self) -> str: ...

    def once(self, turning: Turning) -> float:
        """Do what is due. Return after how many seconds to be called again without being woken; 0: at once."""
        ...


@dataclass(frozen=True, slots=True)
class Health:
    """How a loop fares. `late`: seconds since its turn was due or gave its last sign of life; 0 while it rests."""

    name: str
    late: float
    failing: str = ""
    """The error of its last turn; empty when that was good."""


class Idle:
    """A Turning for turns outside a loop: never stops, tells nobody."""

    stopping = False

    def beat(self) -> None:
        """Nobody listens."""


class Loop:
    """Turns a Step in threads of its own until stopped. An error is logged once, not at every turn, and backs off."""

    def __init__(self, step: Step, *, threads: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = step.name
        self.step, self._clock = step, clock
        self._bell, self._stop, self._lock = _Bell(), threading.Event(), threading.Lock()
        self._due = clock()
        self._failing, self._backoff, self._since = "", 0.0, 0.0
        self._threads = [
            threading.Thread(target=self._run, name=f"{step.name}-{number}", daemon=True) for number in range(threads)
        ]

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def beat(self) -> None:
        self._due = self._clock()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Turn as soon as possible; at least one turn begins after this, in one thread that rests."""
        self._bell.ring()

    def stop(self) -> None:
        """Ask it to end; does not wait."""
        self._stop.set()
        self._bell.ring(for_all=True)

    def join(self, deadline: float) -> bool:
        """Wait for its end until the clock says `deadline`; False when it still runs."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - self._clock()))
        return not any(thread.is_alive() for thread in self._threads)

    def health(self) -> Health:
        return Health(self.name, max(0.0, self._clock() - self._due), self._failing)

    def turn(self) -> float:
        """One turn; the pause after it in seconds."""
        try:
            pause = self.step.once(self)
        except AWAY as error:
            return self._failed(error, expected=True)
        except Exception as error:
            return self._failed(error, expected=False)
        with self._lock:
            if self._failing:
                log.info("%s: goes on after %.1f s (%s)", self.name, self._clock() - self._since, self._failing)
            self._failing, self._backoff = "", 0.0
            self._due = self._clock() + pause
        return pause

    def _failed(self, error: Exception, *, expected: bool) -> float:
        message = f"{type(error).__name__}: {error}"
        with self._lock:
            if not self._failing:
                self._since = self._clock()
            if message != self._failing:
                log.warning("%s: %s; it tries again until that is cured", self.name, message, exc_info=not expected)
            self._failing = message
            self._backoff = min(max(self._backoff * 2, BACKOFF_FIRST), BACKOFF_MAX)
            self._due = self._clock() + self._backoff
            return self._backoff

    def _run(self) -> None:
        while not self._stop.is_set():
            pause = self.turn()
            if self._failing:
                # Bells do not shorten a backoff: they would make it a busy loop.
                self._stop.wait(pause)
            elif pause > 0:
                self._bell.wait(pause)


class _Bell:
    """Wakes one of those that wait, so that a hint costs one turn and not one of every thread; or all, for good."""

    def __init__(self) -> None:
        self._rings = threading.Condition()
        self._rung, self._for_all = False, False

    def ring(self, *, for_all: bool = False) -> None:
        with self._rings:
            self._rung, self._for_all = True, self._for_all or for_all
            self._rings.notify_all() if for_all else self._rings.notify()

    def wait(self, seconds: float) -> None:
        """Wait for a ring that nobody has answered, for so many seconds at most."""
        with self._rings:
            self._rings.wait_for(lambda: self._rung, seconds)
            self._rung = self._for_all
