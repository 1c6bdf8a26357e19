"""Which checkpoints to look at, and when: a thousand hints about one of them are one look."""

from __future__ import annotations

import heapq
import threading
from dataclasses import dataclass

from weighbridge.daemon.layout import Group

REST = 0.01
"""Seconds between two looks at one checkpoint, or as long as the last look took: a storm of events is no storm here."""


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


class Looks:
    """A coalescing queue of groups with due times. Thread-safe; `now` is any monotonic clock in seconds.

    `first` and `longest` bound the pauses between two looks at one that waits; each is twice the one before. A group is
    in one hand at a time: `take` it, then say `again` or `forget`.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        self._states: dict[Group, _State] = {}
        self._heap: list[tuple[float, Group]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._states)

    def hint(self, group: Group, now: float) -> None:
        """Something may have changed there: look as soon as it has rested, with short pauses from then on."""
        with self._lock:
            state = self._states.get(group)
            if state is None:
                state = self._states[group] = _State(now, self._first)
                heapq.heappush(self._heap, (now, group))
                return
            state.pause = self._first
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
            self._put_back(group, state, now, min(state.due, now + state.pause))
            state.pause = min(state.pause * 2, self._longest)

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
            else:
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
