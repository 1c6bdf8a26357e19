"""How many looks go on at once: a few quick ones, and beside them those that hang, which hold up nobody else.

A look is as slow as its store: one key may hang until a timeout of minutes, while all others are answered at once.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from weighbridge.daemon.layout import Group

QUICK = 4
"""Looks at once: they wait for the store most of the time."""
THREADS = 32
"""Looks at once with those that hang: these take no processor, and little memory."""
HANGS = 0.5
"""Seconds after which a look counts as hanging."""
_KNOWN = 8
"""Lanes for what hung the last time: it has no other, so that the rest is left for what nobody knows yet."""
_ONE_MODEL = 12
"""Lanes in which looks of one model may hang."""


@dataclass(frozen=True, slots=True)
class _Look:
    since: float
    hung: bool


class Lanes:
    """The looks that go on. `now` is any monotonic clock in seconds."""

    def __init__(self) -> None:
        self._looks: dict[Group, _Look] = {}

    def __len__(self) -> int:
        return len(self._looks)

    def free_at(self) -> float:
        """When the next look may begin, if none ends before."""
        if len(self._looks) >= THREADS:
            return float("inf")
        youngest = heapq.nlargest(QUICK, (look.since for look in self._looks.values()))
        return youngest[-1] + HANGS if len(youngest) == QUICK else float("-inf")

    def admits(self, group: Group, now: float, *, hung: bool) -> bool:
        """Whether a look at this group may begin; `hung`: the last one did."""
        hanging = [other for other, look in self._looks.items() if look.hung or now - look.since >= HANGS]
        if sum(other.model == group.model for other in hanging) >= _ONE_MODEL:
            return False
        return not hung or sum(look.hung for look in self._looks.values()) < _KNOWN

    def begin(self, group: Group, now: float, *, hung: bool) -> None:
        """A look begins."""
        self._looks[group] = _Look(now, hung)

    def hangs(self, group: Group, now: float) -> bool:
        """Whether a look at it goes on for too long already, or may well do so."""
        look = self._looks.get(group)
        return look is not None and (look.hung or now - look.since >= HANGS)

    def end(self, group: Group, now: float) -> bool:
        """A look is over; return whether it hung."""
        return now - self._looks.pop(group).since >= HANGS
