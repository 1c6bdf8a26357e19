"""What one slot did: requests, errors and latencies on fixed log buckets, cumulative and per interval."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from weighbridge.hosts.blame import UNJUDGED, Blame

BOUNDS = tuple(round(1e-4 * 10 ** (step / 10), 9) for step in range(61))
"""Upper bounds of the latency buckets, seconds: 100 µs to 100 s, ten per decade; one more bucket is open."""


@dataclass(frozen=True)
class Interval:
    """What happened between two snapshots: `counts[i]` requests took at most BOUNDS[i] seconds, the last one more.

    `requests` are those that say something about the version; `blamed` counts by whose fault it was (hosts.blame).
    """

    id: str
    seconds: float
    requests: int
    blamed: Mapping[Blame, int]
    latency_sum: float
    counts: tuple[int, ...]


@dataclass(slots=True)
class Statistics:
    """Totals since the slot was made, of every request that was answered, with whatever status."""

    requests: int = 0
    blamed: Counter[Blame] = field(default_factory=Counter)
    latency_sum: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    _taken: tuple[float, int, Counter[Blame], float, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self._taken = self._now()

    def record(self, fault: Blame, seconds: float) -> None:
        """One answered request; NONE is nobody's fault, as it is none."""
        self.requests += 1
        if fault is not Blame.NONE:
            self.blamed[fault] += 1
        self.latency_sum += seconds
        self.counts[bisect_left(BOUNDS, seconds)] += 1

    def take(self, id: str) -> Interval:
        """What was recorded since the last `take`, under the interval id that the report will carry."""
        before, self._taken = self._taken, self._now()
        then, requests, blamed, latency_sum, counts = before
        new = self.blamed - blamed
        return Interval(
            id,
            self._taken[0] - then,
            self.requests - requests - sum(new[fault] for fault in UNJUDGED),
            new,
            self.latency_sum - latency_sum,
            tuple(now - was for now, was in zip(self.counts, counts, strict=True)),
        )

    def _now(self) -> tuple[float, int, Counter[Blame], float, tuple[int, ...]]:
        return time.monotonic(), self.requests, Counter(self.blamed), self.latency_sum, tuple(self.counts)
