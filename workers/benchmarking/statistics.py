"""What benchmark numbers mean: percentiles, paired ratios, when a process is warm, when p99 is proven. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MIN_SPREAD = 0.02
"""Two processes of one program differ by a percent or two for good (where memory came to lie): no pair of them shows
that, so an A/A spread below this is not believed."""
_DEVIATIONS = 2.576
"""Of a normal distribution: 99% lie within."""
_MOST_CORRELATION = 0.9
_FLAT = 0.03
"""Warm: the median of the last window is within this share of the one before."""

Finding = Literal["faster", "slower", "same"]


@dataclass(frozen=True)
class Comparison:
    """A ratio with the interval that it lies in."""

    ratio: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """How far the farther end lies from the ratio, as a share."""
        return max(self.ratio / self.low, self.high / self.ratio) - 1

    def widened(self, share: float) -> Comparison:
        """With both ends farther out by a share."""
        return Comparison(self.ratio, self.low / (1 + share), self.high * (1 + share))

    def times(self, factor: float) -> Comparison:
        return Comparison(self.ratio * factor, self.low * factor, self.high * factor)

    def overlaps(self, other: Comparison) -> bool:
        return self.low <= other.high and other.low <= self.high


def compare(ratios: Sequence[float]) -> Comparison:
    """The median of paired ratios of rounds with its 99% interval. Raises ValueError without any.

    The interval ends at two of the ratios, those of the sign test (Conover 1999, 3.2): true for any distribution, where
    a bootstrap of few, heavy-tailed rounds is far too narrow. Of less than eight rounds it is all of them.
    """
    if not ratios:
        raise ValueError("no ratios to compare by")
    values = np.sort(np.asarray(ratios, np.float64))
    count = len(values)
    reach = _DEVIATIONS / 2 / math.sqrt(_independent(ratios))
    first = max(0, math.floor(count * (0.5 - reach)) - 1)
    return Comparison(float(np.median(values)), float(values[first]), float(values[count - 1 - first]))


def _independent(ratios: Sequence[float]) -> float:
    """How many independent rounds these are worth: what disturbs one often disturbs the next one too.

    n (1 - r) / (1 + r) by the lag-1 autocorrelation r of their ranks, which outliers do not move; r is raised by
    (1 + 3 r) / n, by which short series show too little of it (Kendall 1954). At least 1.
    """
    count = len(ratios)
    ranks = np.argsort(np.argsort(ratios)) - (count - 1) / 2
    if count < 3:
        return count
    seen = max(0.0, float(ranks[1:] @ ranks[:-1] / (ranks @ ranks)))
    correlation = min(seen + (1 + 3 * seen) / count, _MOST_CORRELATION)
    return max(1.0, count * (1 - correlation) / (1 + correlation))


def spread(ratios: Sequence[float]) -> float:
    """How far from 1 the median ratio of a program against itself may lie, as a share; at least MIN_SPREAD."""
    seen = compare(ratios)
    return max(MIN_SPREAD, 1 / seen.low - 1, seen.high - 1)


def finding(seen: Comparison) -> Finding:
    """Faster or slower only when the whole interval is."""
    if seen.low > 1:
        return "faster"
    return "slower" if seen.high < 1 else "same"


def summary(latencies: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95, p99 and mean, in the unit that comes in. Raises ValueError without any."""
    if not len(latencies):
        raise ValueError("no latencies to sum up")
    p50, p90, p95, p99 = (float(value) for value in np.quantile(latencies, (0.5, 0.9, 0.95, 0.99)))
    return {"p50": p50, "p90": p90, "p95": p95, "p99": p99, "mean": float(np.mean(latencies))}


def histogram(latencies: Sequence[float]) -> dict[str, int]:
    """Counts by upper bound in seconds, twenty bounds a decade: any percentile is known to 12%."""
    steps = np.ceil(20 * np.log10(np.maximum(np.asarray(latencies, np.float64), 1e-9)) - 1e-9).astype(int)
    bounds, counts = np.unique(steps, return_counts=True)
    return {f"{10 ** (step / 20):.3g}": int(count) for step, count in zip(bounds.tolist(), counts, strict=True)}


def is_flat(latencies: Sequence[float], window: int) -> bool:
    """Whether the medians of the last two windows agree."""
    if len(latencies) < 2 * window:
        return False
    last, before = np.median(latencies[-window:]), np.median(latencies[-2 * window : -window])
    return bool(abs(last - before) <= _FLAT * before)


def queries_needed(most: int, quantile: float = 0.99, confidence: float = 0.99) -> list[int]:
    """`[n]`: the fewest queries that prove `quantile` with n of them too late, as far as `most` queries reach.

    MLPerf's early stopping: so few misses are this unlikely (1 − confidence) if more than 1 − quantile were too late.
    With no miss p99 needs 459, p90 44.
    """
    from scipy.stats import binom  # a second of imports

    needed: list[int] = []
    for count in range(1, most + 1):
        if binom.cdf(len(needed), count, 1 - quantile) <= 1 - confidence:
            needed.append(count)
    return needed
