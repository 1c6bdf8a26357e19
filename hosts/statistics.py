"""What one slot did: requests, errors and latencies on fixed log buckets, cumulative and per interval."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS = tuple(round(1e-4 * 10 ** (step / 10), 9) for step in range(61))
"""Upper bounds of the latency buckets, seconds: 100 µs to 100 s, ten per decade; one more bucket is open."""


@dataclass(frozen=True)
class Interval:
    """What happened between two snapshots: `counts[i]` requests took at most BOUNDS[i] seconds, the last one more."""

    id: str
    seconds: float
    requests: int
    errors: int
    latency_sum: float
    counts: tuple[int, ...]


@dataclass(slots=True)
class Statistics:
    """Totals since the slot was made. A client's own mistakes (4xx) are requests but never errors."""

    requests: int = 0
    errors: int = 0
    latency_sum: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    _taken: tuple[float, int, int, float, tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self._taken = self._now()

    def record(self, status: int, seconds: float) -> None:
        """One answered request."""
        self.requests += 1
        self.errors += status >= 500
        self.latency_sum += seconds
        self.counts[bisect_left(BOUNDS, seconds)] += 1

    def take(self, id: str) -> Interval:
        """What was recorded since the last `take`, under the interval id that the report will carry."""
        before, self._taken = self._taken, self._now()
        then, requests, errors, latency_sum, counts = before
        return Interval(
            id,
            self._taken[0] - then,
            self.requests - requests,
            self.errors - errors,
            self.latency_sum - latency_sum,
            tuple(now - was for now, was in zip(self.counts, counts, strict=True)),
        )

    def _now(self) -> tuple[float, int, int, float, tuple[int, ...]]:
        return time.monotonic(), self.requests, self.errors, self.latency_sum, tuple(self.counts)
