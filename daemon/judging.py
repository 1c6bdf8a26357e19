"""Versions that lacked what judges them, a program or an evaluation set, are judged again when it is there.

What changed is told by events and by the listing; what is to be done follows from the store and the registry alone, so
that doing it twice is as good as once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from blake3 import blake3

from weighbridge.daemon.look import identity
from weighbridge.daemon.loops import Turning
from weighbridge.registry import judging
from weighbridge.registry.db import Database
from weighbridge.registry.judging import Judges, Need
from weighbridge.registry.notify import Notifier
from weighbridge.registry.recipe import Policy, policy_for
from weighbridge.storage.protocols import ObjectInfo, Store
from weighbridge.workers import judges

log = logging.getLogger(__name__)

ACTOR = "judging"
_LONGEST_REST = 60.0
_AGAIN_FIRST, _AGAIN_LONGEST = 1.0, 30.0
"""Seconds until a model is looked at again whose versions are still judged by what was there before."""


class Judging:
    """The loop's body: looks at the models that `changed` named, and at those that have to wait for their turn."""

    name = "judging"

    def __init__(
        self,
        store: Store,
        db: Database,
        notifier: Notifier,
        *,
        policies: Sequence[Policy] = (),
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._db, self._notifier = store, db, notifier
        self._policies, self._wake, self._clock = tuple(policies), wake, clock
        self._lock = threading.Lock()
        self._due: dict[str, tuple[float, float]] = {}
        """By model: when to look, and how long the rest before that was."""
        self._begun = False

    def changed(self, model: str) -> None:
        """What judges this model's versions may be another now. From any thread."""
        with self._lock:
            self._due[model] = (self._clock(), 0.0)
        self._wake()

    def once(self, turning: Turning) -> float:
        """Look at what is due; return the seconds until the next is."""
        if not self._begun:
            with self._db.read() as tx:
                waiting = judging.models_without_program(tx)
            for model in waiting:
                self.changed(model)
            self._begun = True
        for model, rest in self._take():
            turning.beat()
            try:
                again = self._look(model, told=rest == 0.0)
            except BaseException:
                self._put(model, 0.0)
                raise
            if again:
                self._put(model, min(max(2 * rest, _AGAIN_FIRST), _AGAIN_LONGEST))
        with self._lock:
            next_due = min((due for due, _ in self._due.values()), default=float("inf"))
        return max(0.0, min(next_due - self._clock(), _LONGEST_REST))

    def _take(self) -> list[tuple[str, float]]:
        with self._lock:
            due = [(model, rest) for model, (when, rest) in self._due.items() if when <= self._clock()]
            for model, _ in due:
                del self._due[model]
        return due

    def _put(self, model: str, rest: float) -> None:
        """Look at it after a rest, unless somebody asks for it sooner."""
        with self._lock:
            self._due.setdefault(model, (self._clock() + rest, rest))

    def _look(self, model: str, *, told: bool) -> bool:
        """Have judged again what lacked what is there now; return whether to look again later."""
        if told:
            with self._db.transaction() as tx:
                woken = judging.wake(tx, model)
            if woken:
                self._ring()
        with self._db.read() as tx:
            lacking = judging.lacking(tx, model)
        if not lacking:
            return False
        try:
            newest = next(iter(lacking.values()))
            there = judges.beside(self._store, judges.folders_of(newest.path, model))
        except judges.Unfit as unfit:
            if told:
                log.info("%s: nothing is judged again yet: %s", model, unfit)
            return True
        policy = policy_for(model, self._policies)
        needs = {version_id: judging.need(seen, there, policy) for version_id, seen in lacking.items()}
        wanting = [version_id for version_id, wanted in needs.items() if wanted in (Need.ANEW, Need.EVALUATION)]
        with self._db.read() as tx:
            room = judging.room(tx, model)
        done = [self._supply(version_id, there, policy) for version_id in wanting[:room]]
        if done:
            self._ring()
        return len(wanting) > room or Need.LATER in (*done, *needs.values())

    def _ring(self) -> None:
        for topic in ("jobs", "events"):
            self._notifier.ring(topic)

    def _supply(self, version_id: int, there: Judges, policy: Policy) -> Need:
        with self._db.transaction() as tx:
            return judging.supply(tx, version_id, there, policy, actor=ACTOR)


class Beside:
    """What listings saw beside the checkpoints: tells `changed` of models whose files are others than they were.

    The first whole listing tells `first`: what waits is looked at then in any case. Listings may run side by side.
    """

    def __init__(self, changed: Callable[[str], None], first: Callable[[str], None]) -> None:
        self._changed, self._first = changed, first
        self._lock = threading.Lock()
        self._known: dict[str, bytes] | None = None

    def look(self) -> Looking:
        """For one listing."""
        return Looking(self._end)

    def _end(self, seen: dict[str, bytes], whole: bool) -> None:
        with self._lock:
            if self._known is None:
                if not whole:
                    return
                told, tell, self._known = set(seen), self._first, dict(seen)
            else:
                gone = self._known.keys() - seen.keys() if whole else set[str]()
                others = {model for model, digest in seen.items() if self._known.get(model) != digest}
                told, tell = others | gone, self._changed
                self._known = seen if whole else self._known | seen
        for model in sorted(told):
            tell(model)


class Looking:
    """One listing's look at what lies beside the checkpoints."""

    def __init__(self, end: Callable[[dict[str, bytes], bool], None]) -> None:
        self._end = end
        self._seen: dict[str, bytes] = {}

    def see(self, model: str, info: ObjectInfo) -> None:
        """A file that judges this model's checkpoints."""
        self._seen[model] = blake3(self._seen.get(model, b"") + identity(info)).digest(16)

    def end(self, *, whole: bool) -> None:
        """The listing is over; `whole`: what it did not see is gone."""
        self._end(self._seen, whole)
