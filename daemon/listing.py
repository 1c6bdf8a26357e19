"""Repair by listing: what no event told. Streams the bucket, compares with what was seen, looks only at differences."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Protocol

from blake3 import blake3

from weighbridge.daemon.judging import Beside, Looking
from weighbridge.daemon.layout import Group, Layout, Wishes
from weighbridge.daemon.look import identity
from weighbridge.daemon.looks import Order, Urgency, order
from weighbridge.daemon.loops import Turning
from weighbridge.registry import checkpoints
from weighbridge.registry.db import Database
from weighbridge.registry.lifecycle import CheckpointState
from weighbridge.storage import completeness, names
from weighbridge.storage.protocols import ObjectInfo, PassedOver, Survey

log = logging.getLogger(__name__)


class Hint(Protocol):
    def __call__(self, group: Group, place: Order | None, urgency: Urgency, batch: int | None) -> None:
        """Take a group to look at: its place among its model's as far as the listing tells, and which listing it is."""


_BEAT = 1000
"""Groups between two signs of life."""
_PENDING = 1000
"""Objects of one group that are hashed together: their number is bounded, and so is the memory."""
_AT_ONCE = 10_000
"""Differences of models with few that one listing tells as it finds them; of all others as many, written last."""
_FEW = 10
"""Differences of a model that are told as they are found, while there is room: the more it has, the less of it."""
_AGAIN = 1000
"""Waiting ones that one listing asks to look at although nothing changed: each in its turn."""
_PREFIXES = 1000
"""Prefixes that are asked for; more are one full listing."""
_NEVER = datetime.fromtimestamp(0, UTC)


class Listing:
    """The loop's body: lists the whole prefix every `seconds`, and at once when it is asked for.

    `hint` is called for every group that must be looked at: new, changed, gone, or waiting for long. What is as it was
    is known by 16 bytes a checkpoint, so that a million of them cost little memory. `judged` is called for every
    model whose recipe or sets are others than at the listing before, `begun` at the first one for those that have any.
    `below` is a loop's body of its own, for single prefixes: somebody may wait for a new folder while all the others
    are listed.
    """

    name = "listing"

    def __init__(
        self,
        store: Survey,
        layout: Layout,
        db: Database,
        hint: Hint,
        *,
        seconds: float = 60.0,
        judged: Callable[[str], None] = lambda model: None,
        begun: Callable[[str], None] = lambda model: None,
        wake: Callable[[], None] = lambda: None,
        wake_below: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._layout, self._db, self._hint = store, layout, db, hint
        self._beside = Beside(judged, begun)
        self._seconds, self._wake, self._clock = seconds, wake, clock
        self._asked, self._due, self._took = True, clock(), 0.0
        self._numbers, self._last = itertools.count(1), 0
        self.below = Below(self, wake_below)

    def request(self, prefix: str) -> None:
        """List below this prefix as soon as possible."""
        if prefix != self._layout.prefix and self.below.request(prefix):
            return
        self._asked = True
        self._wake()

    def once(self, turning: Turning) -> float:
        """List all if that is due; return the seconds until it is again. What failed stays due.

        Who asks again and again has it listed half of the time.
        """
        start = self._clock()
        due = self._due - self._seconds + self._took if self._asked else self._due
        if start < due:
            return due - start
        self._asked, asked = False, self._asked
        try:
            self.run(self._layout.prefix, turning)
        except BaseException:
            self._asked = asked
            raise
        now = self._clock()
        self._took, self._due = now - start, now + self._seconds
        return min(self._seconds, self._took) if self._asked else self._seconds

    def run(self, prefix: str, turning: Turning, urgency: Urgency = Urgency.FOUND) -> int:
        """List one prefix now; return how many groups were hinted at."""
        number = next(self._numbers)
        told = _Differences(lambda group, place: self._hint(group, place, urgency, number))
        settled, unsettled = self._seen(prefix, turning)
        beside = self._beside.look()
        for count, (group, seen, newest) in enumerate(self._groups(prefix, beside)):
            if count % _BEAT == 0:
                turning.beat()
                if turning.stopping:
                    return told.count
            known = _fingerprint(group.path, seen)
            if known in settled:
                settled.discard(known)
            elif known in unsettled:
                unsettled.discard(known)
            else:
                told.add(order(newest.timestamp(), group.path), group)
        told.end()
        beside.end(whole=prefix == self._layout.prefix)
        if told.left:
            self._asked = True
        return told.count + self._hint_gone(prefix, unsettled, turning) + self._hint_waiting(prefix)

    def _seen(self, prefix: str, turning: Turning) -> tuple[set[bytes], set[bytes]]:
        """Fingerprints of what versions came from, and of what waits or was refused, as it was seen."""
        settled, unsettled = set[bytes](), set[bytes]()
        with self._db.read() as tx:
            rows = checkpoints.seen(tx, model=self._layout.model_of(prefix), below=prefix)
            for _, path, seen, state in _beating(rows, turning):
                (settled if state == CheckpointState.COMPLETE else unsettled).add(_fingerprint(path, seen))
        return settled, unsettled

    def _hint_gone(self, prefix: str, unmet: set[bytes], turning: Turning) -> int:
        """Look at what waited or was refused and is gone or changed; what is complete stays so when it is gone."""
        if not unmet:
            return 0
        hinted = 0
        with self._db.read() as tx:
            states = [CheckpointState.WAITING, CheckpointState.REFUSED]
            rows = checkpoints.seen(tx, states, model=self._layout.model_of(prefix), below=prefix)
            for model, path, seen, _ in _beating(rows, turning):
                if _fingerprint(path, seen) in unmet:
                    self._hint(Group(model, path), None, Urgency.FOUND, None)
                    hinted += 1
                    if hinted == _AT_ONCE:
                        break
        return hinted

    def _hint_waiting(self, prefix: str) -> int:
        """Look at what waits, some at each listing: what it waits for may show in no listing (an upload, a marker)."""
        if prefix != self._layout.prefix:
            return 0
        with self._db.read() as tx:
            rows = checkpoints.waiting_after(tx, self._last, _AGAIN)
        self._last = rows[-1][0] if len(rows) == _AGAIN else 0
        for _, model, path in rows:
            self._hint(Group(model, path), None, Urgency.AGAIN, None)
        return len(rows)

    def _groups(self, prefix: str, beside: Looking) -> Iterator[tuple[Group, str, datetime]]:
        """Each group below the prefix with its listing's digest, and when its weights were written.

        A folder's objects come together, says the store.
        """
        group: Group | None = None
        now = datetime.now(UTC)
        inside, hasher, pending, newest, count = "\0", blake3(), list[bytes](), _NEVER, 0
        for found in self._store.survey(prefix):
            if not found.key.startswith(inside):
                if group is not None:
                    yield group, hasher.update(b"".join(pending)).hexdigest(16), newest
                whose = self._layout.passed if isinstance(found, PassedOver) else self._layout.place
                place = whose(found.key)
                if isinstance(place, Wishes) and isinstance(found, ObjectInfo):
                    beside.see(place.model, found)
                group = place if isinstance(place, Group) else None
                inside = group.path if group is not None and group.folder else "\0"
                hasher, pending, newest, count = blake3(), [], _NEVER, 0
            if group is not None:
                if isinstance(found, PassedOver):
                    newest = now  # it has no date, and is soon looked at
                elif found.modified > newest and _counts(found, inside):
                    newest = found.modified
                count += 1
                if count <= completeness.MAX_OBJECTS:
                    pending.append(identity(found))
                if len(pending) == _PENDING:
                    hasher.update(b"".join(pending))
                    pending.clear()
        if group is not None:
            yield group, hasher.update(b"".join(pending)).hexdigest(16), newest


class Below:
    """The loop's body: lists below the prefixes that were asked for."""

    name = "rescan"

    def __init__(self, listing: Listing, wake: Callable[[], None]) -> None:
        self._listing, self._wake = listing, wake
        self._lock = threading.Lock()
        self._requested: dict[str, None] = {}

    def request(self, prefix: str) -> bool:
        """List below this prefix as soon as possible; False where too many were asked for."""
        with self._lock:
            if len(self._requested) >= _PREFIXES and prefix not in self._requested:
                return False
            self._requested[prefix] = None
        self._wake()
        return True

    def once(self, turning: Turning) -> float:
        """List below one prefix, the one asked for last; 0 while there are more. What failed stays asked for."""
        with self._lock:
            if not self._requested:
                return _PAUSE
            prefix, _ = self._requested.popitem()
        try:
            self._listing.run(prefix, turning, Urgency.TOLD)
        except BaseException:
            with self._lock:
                self._requested.setdefault(prefix)
            raise
        return 0.0


_PAUSE = 60.0


class _Differences:
    """Tells a listing's differences, one model's together and the oldest first: of them none is recorded before an
    older one was seen. Memory is bounded: of very many, those that were written last are told, the others by the next
    listing (`left` says how many)."""

    def __init__(self, tell: Callable[[Group, Order], None]) -> None:
        self._hint, self.count, self.left = tell, 0, 0
        self._model: list[tuple[Order, Group]] = []
        self._many, self._last = False, ""
        self._late: list[tuple[Order, Group]] = []

    def add(self, place: Order, group: Group) -> None:
        if self._last != group.model:
            self._next()
            self._last = group.model
        self._model.append((place, group))
        if self._many or len(self._model) > _FEW:
            self._put_off()

    def end(self) -> None:
        self._next()
        self._tell(self._late)

    def _next(self) -> None:
        """The model has no more. One with few is told at once; a crowd waits until all of it was seen.

        Thousands of models with ten each leave room for those with one.
        """
        room = _AT_ONCE * (1 - (len(self._model) - 1) / _FEW)
        if not self._many and self.count < room:
            self._tell(self._model)
        self._put_off()
        self._many = False

    def _put_off(self) -> None:
        self._many = True
        for one in self._model:
            if len(self._late) < _AT_ONCE:
                heapq.heappush(self._late, one)
            else:
                heapq.heappushpop(self._late, one)
                self.left += 1
        self._model.clear()

    def _tell(self, found: list[tuple[Order, Group]]) -> None:
        for place, group in sorted(found):
            self._hint(group, place)
        self.count += len(found)
        found.clear()


def _counts(info: ObjectInfo, inside: str) -> bool:
    """Whether the object's date is one of the checkpoint's."""
    return inside == "\0" or names.is_weights(info.key)


def _fingerprint(path: str, seen: str) -> bytes:
    return blake3(f"{path}\0{seen}".encode()).digest(16)


def _beating(rows: Iterable[tuple[str, str, str, str]], turning: Turning) -> Iterator[tuple[str, str, str, str]]:
    for number, row in enumerate(rows):
        if number % _BEAT == 0:
            turning.beat()
        yield row
