"""Repair by listing: what no event told. Streams the bucket, compares with what was seen, looks only at differences."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime

from blake3 import blake3

from weighbridge.daemon.judging import Beside, Looking
from weighbridge.daemon.layout import Group, Layout, Wishes
from weighbridge.daemon.look import identity
from weighbridge.daemon.looks import Order, order
from weighbridge.daemon.loops import Turning
from weighbridge.registry import checkpoints
from weighbridge.registry.db import Database
from weighbridge.registry.lifecycle import CheckpointState
from weighbridge.storage import names
from weighbridge.storage.protocols import List

log = logging.getLogger(__name__)

Hint = Callable[[Group, Order | None], None]
"""Takes a group to look at, with its place among its model's as far as the listing tells."""

_BEAT = 1000
"""Groups between two signs of life."""
_PENDING = 1000
"""Objects of one group that are hashed together: their number is bounded, and so is the memory."""
_NEVER = datetime.fromtimestamp(0, UTC)


class Listing:
    """The loop's body: lists the whole prefix every `seconds`, and what `request` asked for at once.

    `hint` is called for every group that must be looked at: new, changed, gone, or waiting. What is settled and as it
    was is known by 16 bytes a checkpoint, so that a million of them cost little memory. `judged` is called for every
    model whose recipe or sets are others than at the listing before, `begun` at the first one for those that have any.
    """

    name = "listing"

    def __init__(
        self,
        store: List,
        layout: Layout,
        db: Database,
        hint: Hint,
        *,
        seconds: float = 60.0,
        judged: Callable[[str], None] = lambda model: None,
        begun: Callable[[str], None] = lambda model: None,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._layout, self._db, self._hint = store, layout, db, hint
        self._beside = Beside(judged, begun)
        self._seconds, self._wake, self._clock = seconds, wake, clock
        self._lock = threading.Lock()
        self._requested: set[str] = set()
        self._due = clock()

    def request(self, prefix: str) -> None:
        """List below this prefix as soon as possible."""
        with self._lock:
            self._requested.add(prefix)
        self._wake()

    def once(self, turning: Turning) -> float:
        """List what is due; return the seconds until the next full listing. What failed stays due."""
        with self._lock:
            requested = set(self._requested)
        full = self._clock() >= self._due or self._layout.prefix in requested
        prefixes = [self._layout.prefix] if full else sorted(requested)
        for prefix in prefixes:
            self.run(prefix, turning)
        with self._lock:
            self._requested -= requested
        if full:
            self._due = self._clock() + self._seconds
        return max(0.0, self._due - self._clock())

    def run(self, prefix: str, turning: Turning) -> int:
        """List one prefix now; return how many groups were hinted at."""
        settled = self._settled(turning)
        hinted = 0
        beside = self._beside.look()
        different: list[tuple[Order, Group]] = []
        for number, (group, seen, newest) in enumerate(self._groups(prefix, beside)):
            if number % _BEAT == 0:
                turning.beat()
                if turning.stopping:
                    return hinted
            if different and different[0][1].model != group.model:
                hinted += self._tell(different)
            known = _fingerprint(group.path, seen)
            if known in settled:
                settled.discard(known)
            else:
                different.append((order(newest.timestamp(), group.path), group))
        beside.end(whole=prefix == self._layout.prefix)
        return hinted + self._tell(different) + self._hint_rest(prefix, settled, turning)

    def _tell(self, different: list[tuple[Order, Group]]) -> int:
        """Hint at one model's together, the oldest first: none of them is recorded before an older one was seen."""
        found = sorted(different)
        different.clear()
        for place, group in found:
            self._hint(group, place)
        return len(found)

    def _settled(self, turning: Turning) -> set[bytes]:
        """Fingerprints of what is decided as it was seen: complete or refused."""
        with self._db.read() as tx:
            rows = checkpoints.seen(tx, [CheckpointState.COMPLETE, CheckpointState.REFUSED])
            return {_fingerprint(path, seen) for _, path, seen, _ in _beating(rows, turning)}

    def _hint_rest(self, prefix: str, unmet: set[bytes], turning: Turning) -> int:
        """Look at what waits, and at what was refused and is gone; complete ones that are gone stay what they are."""
        hinted = 0
        with self._db.read() as tx:
            rows = checkpoints.seen(tx, [CheckpointState.WAITING, CheckpointState.REFUSED])
            for model, path, seen, state in _beating(rows, turning):
                looked = state == CheckpointState.WAITING or _fingerprint(path, seen) in unmet
                if looked and path.startswith(prefix):
                    hinted += 1
                    self._hint(Group(model, path), None)
        return hinted

    def _groups(self, prefix: str, beside: Looking) -> Iterator[tuple[Group, str, datetime]]:
        """Each group below the prefix with its listing's digest, and when its weights were written.

        A folder's objects come together, says the store.
        """
        group: Group | None = None
        inside, hasher, pending, newest = "\0", blake3(), list[bytes](), _NEVER
        for info in self._store.list(prefix):
            if not info.key.startswith(inside):
                if group is not None:
                    yield group, hasher.update(b"".join(pending)).hexdigest(16), newest
                place = self._layout.place(info.key)
                if isinstance(place, Wishes):
                    beside.see(place.model, info)
                group = place if isinstance(place, Group) else None
                inside = group.path if group is not None and group.folder else "\0"
                hasher, pending, newest = blake3(), [], _NEVER
            if group is not None:
                if info.modified > newest and (inside == "\0" or names.is_weights(info.key)):
                    newest = info.modified
                pending.append(identity(info))
                if len(pending) == _PENDING:
                    hasher.update(b"".join(pending))
                    pending.clear()
        if group is not None:
            yield group, hasher.update(b"".join(pending)).hexdigest(16), newest


def _fingerprint(path: str, seen: str) -> bytes:
    return blake3(f"{path}\0{seen}".encode()).digest(16)


def _beating(rows: Iterable[tuple[str, str, str, str]], turning: Turning) -> Iterator[tuple[str, str, str, str]]:
    for number, row in enumerate(rows):
        if number % _BEAT == 0:
            turning.beat()
        yield row
