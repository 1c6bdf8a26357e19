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
_RESAMPLES = 1000
_CONFIDENCE = 0.99
_FLAT = 0.03
"""Warm: the median of the last window is within this share of the one before."""

Finding = Literal["faster", "slower", "same"]


@dataclass(frozen=True)
class Comparison:
    """Paired ratios of rounds: their median, and its 99% percentile bootstrap interval (Efron 1979)."""

    ratio: float
    low: float
    high: float


def compare(ratios: Sequence[float]) -> Comparison:
    """Raises ValueError without any."""
    if not ratios:
        raise ValueError("no ratios to compare by")
    values = np.asarray(ratios, np.float64)
    draws = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(np.median(values[draws], axis=1), (tail, 1 - tail))
    return Comparison(float(np.median(values)), float(low), float(high))


def spread(ratios: Sequence[float]) -> float:
    """How far from 1 the median ratio of a program against itself may lie, as a share; at least MIN_SPREAD."""
    seen = compare(ratios)
    return max(MIN_SPREAD, 1 - seen.low, seen.high - 1)


def finding(seen: Comparison, spread: float) -> Finding:
    """Faster or slower only when the whole interval is beyond what two runs of one program differ by."""
    if seen.low > 1 + spread:
        return "faster"
    return "slower" if seen.high < 1 - spread else "same"


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
    needed: list[int] = []
    for count in range(1, most + 1):
        if _binomial(len(needed), count, 1 - quantile) <= 1 - confidence:
            needed.append(count)
    return needed


def _binomial(misses: int, count: int, share: float) -> float:
    """The chance of at most so many misses."""
    return sum(
        math.exp(
            math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            + k * math.log(share) + (count - k) * math.log1p(-share)
        )
        for k in range(min(misses, count) + 1)
    )  # fmt: skip
