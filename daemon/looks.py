"""Which checkpoints to look at, and when: a thousand hints about one of them are one look.

And in which order what was found is recorded: of one model, what was written first is recorded first, however many
threads look and in whichever order the hints came. Memory is bounded: of more than it holds, the oldest hints are
dropped, and the next listing finds what they meant.
"""

from __future__ import annotations

import heapq
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from enum import IntEnum

from weighbridge.daemon.fair import FairQueue
from weighbridge.daemon.lanes import HANGS, Lanes
from weighbridge.daemon.layout import Group

REST = 0.01
"""Seconds between two looks at one checkpoint, or as long as the last look took: a storm of events is no storm here."""
PATIENCE = 10.0
"""Seconds that a checkpoint waits at most for older ones that may be recorded before it."""

CROWD = 256
"""In a model with more open ones than this, only those that somebody looks at, or found whole, are waited for."""
CAPACITY = 10_000
"""Groups of one urgency that are remembered."""
PARKED = 1000
"""Groups that are remembered while they wait for their next look; the listings remember the others."""

Order = tuple[float, tuple[str | int, ...]]
"""When weights were written (s since the epoch), and their path with its numbers as numbers for those of one moment."""


class Urgency(IntEnum):
    """Why a group is looked at. Each has its share of the looks, whatever the others have to do."""

    TOLD = 0
    """An event, which somebody may be waiting for."""
    FOUND = 1
    """A listing saw a difference."""
    AGAIN = 2
    """It waits, and nothing is known to have changed."""


_SHARES = (Urgency.TOLD, Urgency.FOUND, Urgency.TOLD, Urgency.AGAIN)


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
    urgency: Urgency = Urgency.TOLD
    batch: int | None = None
    """The listing that found it: those of one are looked at in the listing's order."""
    placed: bool = False
    """It was found whole, and is to be recorded."""
    hung: bool = False
    """Its last look took long: the store does not answer for this one."""
    queued: bool = False
    """It is due, and in the queue of its urgency."""


@dataclass(slots=True)
class _Line:
    """The open groups of one model: those of unknown order, and the others, the oldest first (some of them closed)."""

    unknown: set[Group] = field(default_factory=set)
    known: list[tuple[Order, Group]] = field(default_factory=list)
    looked: set[Group] = field(default_factory=set)
    """Those that are in somebody's hand, or were found whole."""
    count: int = 0


class Looks:
    """A coalescing queue of groups with due times. Thread-safe; `now` is any monotonic clock in seconds.

    `first` and `longest` bound the pauses between two looks at one that waits; each is twice the one before. A group is
    in one hand at a time: `take` it, then say `again` or `forget`.
    """

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        self._states: dict[Group, _State] = {}
        self._heap: list[tuple[float, Group]] = []
        self._queues = {urgency: FairQueue(CAPACITY) for urgency in Urgency}
        self._turn, self._queued, self._since, self._paced = 0, 0, 0.0, 0.0
        self._lanes = Lanes()
        self._lines: defaultdict[str, _Line] = defaultdict(_Line)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._states)

    def hint(
        self,
        group: Group,
        now: float,
        order: Order | None = None,
        urgency: Urgency = Urgency.TOLD,
        batch: int | None = None,
    ) -> None:
        """Something may have changed there: look as soon as it has rested, with short pauses from then on.

        `order` is its place as far as the hint tells; a look tells it better. `batch` says whose listing found it.
        """
        with self._lock:
            state = self._states.get(group)
            if state is None:
                state = self._states[group] = _State(now, self._first, hinted=now, urgency=urgency, batch=batch)
                self._open(group, state, order)
                heapq.heappush(self._heap, (now, group))
                self._queue(now)
                return
            if urgency is Urgency.AGAIN:
                return  # It is remembered, and has its pauses.
            state.pause = self._first
            if not state.open:
                state.hinted = now
                self._open(group, state, order)
            self._hasten(group, urgency, batch)
            self._schedule(group, state, max(now, state.rested))

    def take(self, now: float) -> Group | None:
        """Return a due group, now in the caller's hand; None where there is none, or no lane for it yet."""
        with self._lock:
            self._queue(now)
            while self._lanes.free_at() <= now and (urgency := self._whose_turn(now)) is not None:
                group = self._queues[urgency].take()
                state = None if group is None else self._states.get(group)
                if group is None or state is None or not state.queued or state.urgency != urgency:
                    continue  # it was queued again, more urgently
                self._queued -= 1
                state.queued, state.due = False, float("inf")
                if not self._lanes.admits(group, now, hung=state.hung):
                    self._schedule(group, state, now + 2 * HANGS)
                    continue
                self._lanes.begin(group, now, hung=state.hung)
                state.in_hand, state.taken = True, now
                if state.open:
                    self._lines[group.model].looked.add(group)
                return group
        return None

    def spent(self, seconds: float, now: float) -> None:
        """Looks took so much of the processor: those that nobody waits for rest for as long, and leave it to others."""
        with self._lock:
            self._paced = max(self._paced, now) + seconds

    def again(self, group: Group, now: float) -> None:
        """It waits: put it back, to be looked at after its pause or when a hint comes (or came meanwhile)."""
        with self._lock:
            state = self._states[group]
            self._end(group, state, now)
            unchanged = state.due == float("inf")
            if unchanged:
                self._close(group, state)
                state.urgency, state.batch = Urgency.AGAIN, None
                if len(self._states) - self._queued - len(self._lanes) > PARKED:
                    del self._states[group]
                    return
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
            if line.count > CROWD:
                return self._older_looked(line, order, state.ready, now)
            first = next((one for one in line.unknown if self._states[one].hinted <= state.ready), None)
            if first is None and line.known[0][0] < order:
                first = line.known[0][1]
            if first is None or (self._hangs(first, now) and (first := self._next(line, state, order, now)) is None):
                return 0.0
            self._hasten(first, Urgency.TOLD, None)  # somebody waits for it
            pause = self._states[first].due - now
            return min(max(pause, REST), self._first) if pause < float("inf") else REST * 2

    def _hangs(self, group: Group, now: float) -> bool:
        """Nobody waits for one that the store does not answer for: that may take minutes."""
        state = self._states[group]
        return not state.placed and (state.hung or self._lanes.hangs(group, now))

    def _next(self, line: _Line, state: _State, order: Order, now: float) -> Group | None:
        """What is in the way of a group with this order beside those that hang."""
        older = (one for place, one in line.known if place < order and self._is_at(one, place))
        unknown = (one for one in line.unknown if self._states[one].hinted <= (state.ready or now))
        return next((one for one in (*unknown, *older) if not self._hangs(one, now)), None)

    def _hasten(self, group: Group, urgency: Urgency, batch: int | None) -> None:
        """Give it a higher urgency, if this is one."""
        state = self._states[group]
        if urgency < state.urgency:
            state.urgency, state.batch = urgency, batch
            if state.queued:
                self._enqueue(group, state)

    def _older_looked(self, line: _Line, order: Order, ready: float, now: float) -> float:
        """The same in a crowd, whose order nobody can wait for: what is whole, or was looked at at that moment."""
        for one in line.looked:
            state = self._states[one]
            older = state.order is None or state.order < order
            asked = state.in_hand and state.taken <= ready and not self._hangs(one, now)
            if older and (state.placed or asked):
                return self._first if state.placed else REST * 2
        return 0.0

    def place(self, group: Group, order: Order) -> None:
        """A look at a group in hand told its order."""
        with self._lock:
            state = self._states[group]
            state.placed = True
            self._open(group, state, order)

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
            self._end(group, state, now)
            self._put_back(group, state, now, min(state.due, now + seconds))

    def forget(self, group: Group, now: float) -> None:
        """It is decided: no further look, unless a hint came meanwhile."""
        with self._lock:
            state = self._states[group]
            self._end(group, state, now)
            if state.due == float("inf"):
                del self._states[group]
                self._close(group, state)
            else:
                state.ready, state.hinted = None, now
                self._put_back(group, state, now, state.due)

    def next_due(self) -> float:
        """When the next group is due, and has a lane; infinity when none is."""
        with self._lock:
            begins = float("inf")
            if self._queued:
                paced = self._since if self._queues[Urgency.TOLD] else self._paced
                begins = max(self._since, paced, self._lanes.free_at())
            while self._heap:
                due, group = self._heap[0]
                if self._waits_until(group, due):
                    return min(due, begins)
                heapq.heappop(self._heap)
        return begins

    def _whose_turn(self, now: float) -> Urgency | None:
        """The urgency of the next look; None where nothing is due, or may be yet."""
        self._turn += 1
        share = _SHARES[self._turn % len(_SHARES)]
        if now < self._paced:
            return Urgency.TOLD if self._queues[Urgency.TOLD] else None
        return share if self._queues[share] else next((one for one in Urgency if self._queues[one]), None)

    def _waits_until(self, group: Group, due: float) -> bool:
        state = self._states.get(group)
        return state is not None and state.due == due and not state.in_hand and not state.queued

    def _queue(self, now: float) -> None:
        """What is due by now takes its place among the others that are."""
        while self._heap and self._heap[0][0] <= now:
            due, group = heapq.heappop(self._heap)
            if self._waits_until(group, due):
                state = self._states[group]
                state.queued, self._since = True, due
                self._queued += 1
                self._enqueue(group, state)

    def _enqueue(self, group: Group, state: _State) -> None:
        gone = self._queues[state.urgency].put(group, state.batch)
        dropped = None if gone is None else self._states.get(gone)
        if gone is not None and dropped is not None and dropped.queued and dropped.urgency == state.urgency:
            self._queued -= 1
            del self._states[gone]
            self._close(gone, dropped)

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
        if not state.open:
            line.count += 1
        if state.in_hand:
            line.looked.add(group)
        state.open = True
        self._tidy(group.model, line)

    def _close(self, group: Group, state: _State) -> None:
        """Take it out of its model's line."""
        line = self._lines[group.model]
        line.count -= state.open
        state.open, state.placed, state.ready = False, False, None
        line.unknown.discard(group)
        line.looked.discard(group)
        self._tidy(group.model, line)

    def _tidy(self, model: str, line: _Line) -> None:
        """The line begins with one that is open, or is none."""
        while line.known:
            place, group = line.known[0]
            if self._is_at(group, place):
                break
            heapq.heappop(line.known)
        if len(line.known) > 2 * line.count + CROWD:
            line.known = [(place, one) for place, one in line.known if self._is_at(one, place)]
            heapq.heapify(line.known)
        if not line.known and not line.unknown:
            self._lines.pop(model, None)

    def _is_at(self, group: Group, place: Order) -> bool:
        state = self._states.get(group)
        return state is not None and state.open and state.order == place

    def _end(self, group: Group, state: _State, now: float) -> None:
        state.hung = self._lanes.end(group, now)
        state.in_hand = False

    def _put_back(self, group: Group, state: _State, now: float, due: float) -> None:
        state.due = float("inf")
        state.rested = now + max(REST, now - state.taken)
        self._schedule(group, state, max(due, state.rested))

    def _schedule(self, group: Group, state: _State, due: float) -> None:
        """Make it due at `due`, or keep the earlier time; in somebody's hand it is only remembered."""
        if due >= state.due:
            return  # also when it is queued: then it is due already
        state.due = due
        if not state.in_hand:
            heapq.heappush(self._heap, (due, group))
