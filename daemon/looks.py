"""Which checkpoints to look at, and when: a thousand hints about one of them are one look.

And in which order what was found is recorded: of one model, what was written first is recorded first, however many
threads look and in whichever order the hints came.
"""

from __future__ import annotations

import heapq
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field

from weighbridge.daemon.layout import Group

REST = 0.01
"""Seconds between two looks at one checkpoint, or as long as the last look took: a storm of events is no storm here."""
PATIENCE = 10.0
"""Seconds that a checkpoint waits at most for older ones that may be recorded before it."""

Order = tuple[float, tuple[str | int, ...]]
"""When weights were written (s since the epoch), and their path with its numbers as numbers for those of one moment."""


def order(written: float, path: str) -> Order:
    """The place of a checkpoint among those of its model: by time, then `step-900` before `step-1000`."""
    parts = re.split(r"([0-9]+)", path)
    return written, tuple(int(part) if number % 2 else part for number, part in enumerate(parts))


@dataclass(slots=True)
class _State:
    due: float
    pause: float
    """The next pause before looking again without a hint (s)."""
    rested: float = 0.0
    """Not before this time."""
    in_hand: bool = False
    taken: float = 0.0
    seen: str = ""
    since: float = 0.0
    open: bool = False
    """It may be recorded by its next look."""
    order: Order | None = None
    """None: nobody has looked yet."""
    hinted: float = 0.0
    ready: float | None = None
    """Since when nothing but older ones is in its way."""


@dataclass(slots=True)
class _Line:
    """The open groups of one model: those of unknown order, and the others, the oldest first (some of them closed)."""

    unknown: set[Group] = field(default_factory=set)
    known: list[tuple[Order, Group]] = field(default_factory=list)


class Looks:
    """A coalescing queue of groups with due times. Thread-safe; `now` is any monotonic clock in seconds.

    `first` and `longest` bound the pauses between two looks at one that waits; each is twice the one before. A group is
    in one hand at a time: `take` it, then say `again` or `forget`.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        self._states: dict[Group, _State] = {}
        self._heap: list[tuple[float, Group]] = []
        self._lines: defaultdict[str, _Line] = defaultdict(_Line)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._states)

    def hint(self, group: Group, now: float, order: Order | None = None) -> None:
        """Something may have changed there: look as soon as it has rested, with short pauses from then on.

        `order` is its place as far as the hint tells; a look tells it better.
        """
        with self._lock:
            state = self._states.get(group)
            if state is None:
                state = self._states[group] = _State(now, self._first, hinted=now)
                self._open(group, state, order)
                heapq.heappush(self._heap, (now, group))
                return
            state.pause = self._first
            if not state.open:
                state.hinted = now
                self._open(group, state, order)
            self._schedule(group, state, max(now, state.rested))

    def take(self, now: float) -> Group | None:
        """Return a due group, now in the caller's hand, or None."""
        with self._lock:
            while self._heap and self._heap[0][0] <= now:
                due, group = heapq.heappop(self._heap)
                state = self._states.get(group)
                if state is not None and state.due == due and not state.in_hand:
                    state.in_hand, state.due, state.taken = True, float("inf"), now
                    return group
        return None

    def again(self, group: Group, now: float) -> None:
        """It waits: put it back, to be looked at after its pause or when a hint comes (or came meanwhile)."""
        with self._lock:
            state = self._states[group]
            if state.due == float("inf"):
                self._close(group, state)
            self._put_back(group, state, now, min(state.due, now + state.pause))
            state.pause = min(state.pause * 2, self._longest)

    def older(self, group: Group, order: Order, now: float) -> float:
        """Seconds until it is worth asking again whether a group in hand is the next to be recorded; 0: it is.

        In its way are older ones of its model, and those hinted at before it was found that nobody has looked at yet.
        """
        with self._lock:
            state, line = self._states[group], self._lines[group.model]
            self._open(group, state, order)
            if state.ready is None:
                state.ready = now
            if now - state.ready >= PATIENCE:
                return 0.0
            first = next((one for one in line.unknown if self._states[one].hinted <= state.ready), None)
            if first is None and line.known[0][0] < order:
                first = line.known[0][1]
            if first is None:
                return 0.0
            pause = self._states[first].due - now
            return min(max(pause, REST), self._first) if pause < float("inf") else REST * 2

    def place(self, group: Group, order: Order) -> None:
        """A look at a group in hand told its order."""
        with self._lock:
            self._open(group, self._states[group], order)

    def unchanged(self, group: Group, seen: str, now: float) -> float:
        """Say for how many seconds a group in hand has looked like `seen`: 0 when it is seen like this first."""
        with self._lock:
            state = self._states[group]
            if state.seen != seen:
                state.seen, state.since = seen, now
            return now - state.since

    def again_in(self, group: Group, seconds: float, now: float) -> None:
        """Put it back, to be looked at in `seconds` at the latest; its pauses stay as they are."""
        with self._lock:
            state = self._states[group]
            self._put_back(group, state, now, min(state.due, now + seconds))

    def forget(self, group: Group, now: float) -> None:
        """It is decided: no further look, unless a hint came meanwhile."""
        with self._lock:
            state = self._states[group]
            if state.due == float("inf"):
                del self._states[group]
                self._close(group, state)
            else:
                state.ready, state.hinted = None, now
                self._put_back(group, state, now, state.due)

    def next_due(self) -> float:
        """When the next group is due; infinity when none is."""
        with self._lock:
            while self._heap:
                due, group = self._heap[0]
                state = self._states.get(group)
                if state is not None and state.due == due and not state.in_hand:
                    return due
                heapq.heappop(self._heap)
        return float("inf")

    def _open(self, group: Group, state: _State, order: Order | None) -> None:
        """Put it into its model's line, or to another place in it."""
        line, moved = self._lines[group.model], order is not None and order != state.order
        state.order = order if moved else state.order
        if state.order is None:
            line.unknown.add(group)
        else:
            line.unknown.discard(group)
            if moved or not state.open:
                heapq.heappush(line.known, (state.order, group))
        state.open = True
        self._tidy(group.model, line)

    def _close(self, group: Group, state: _State) -> None:
        """Take it out of its model's line."""
        state.open, state.ready, line = False, None, self._lines[group.model]
        line.unknown.discard(group)
        self._tidy(group.model, line)

    def _tidy(self, model: str, line: _Line) -> None:
        """The line begins with one that is open, or is none."""
        while line.known:
            place, group = line.known[0]
            state = self._states.get(group)
            if state is not None and state.open and state.order == place:
                break
            heapq.heappop(line.known)
        if not line.known and not line.unknown:
            self._lines.pop(model, None)

    def _put_back(self, group: Group, state: _State, now: float, due: float) -> None:
        state.in_hand, state.due = False, float("inf")
        state.rested = now + max(REST, now - state.taken)
        self._schedule(group, state, max(due, state.rested))

    def _schedule(self, group: Group, state: _State, due: float) -> None:
        """Make it due at `due`, or keep the earlier time; in somebody's hand it is only remembered."""
        if due >= state.due:
            return
        state.due = due
        if not state.in_hand:
            heapq.heappush(self._heap, (due, group))
