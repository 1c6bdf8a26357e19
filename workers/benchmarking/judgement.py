"""Which clock decides a comparison, and how wide its interval must be. Pure.

On a free machine the wall clock decides: it is what callers feel. Beside other work it measures the scheduler: of a
request that is longer than a slice (3 ms) it says mostly how often it was interrupted. Processor time has none of that
in it, so there it decides, and the wall clock must not contradict it. What processor time keeps of the neighbours
(their lines in the caches, their share of the memory's bandwidth) is what SHIFT is for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from weighbridge.workers.benchmarking import statistics
from weighbridge.workers.benchmarking.statistics import Comparison

Clock = Literal["wall", "cpu", "both"]

SHIFT = 0.15
"""How far other work moves the ratio of two programs, as a share: one suffers more than the other. Measured on 2
processors, of processor time: 5% beside two processes that compute, 10% beside two that copy memory, 15–20% beside a
dozen."""
REACH = 3.0
"""Or so many times as far as the ratio moves between the usual requests and the least disturbed ones of the same run: a
free machine lies farther out. Beside that dozen both programs took twice the processor time or more, and 1.89 had
become 1.51, with 1.63 for the least disturbed."""
PRECISE, PRECISE_CONTENDED = 0.03, 0.08
"""An interval of the rounds that is narrower than this, as a share, needs no more rounds: what SHIFT adds is more."""
_MOST = 5.0
"""A logarithm: a factor beyond which nobody cares by how much."""
WIDE = 0.5
"""An interval that reaches farther than this share from its middle, and holds 1, shows nothing at all."""


@dataclass(frozen=True)
class Ratios:
    """Paired ratios of the same rounds by both clocks; `cpu` None where the device is no processor."""

    wall: Sequence[float]
    cpu: Sequence[float] | None
    wall_moved: float = 0.0
    cpu_moved: float = 0.0
    """How far the ratio of the usual requests lies from that of the least disturbed ones; logarithms."""

    def precise(self, *, contended: bool) -> bool:
        """Whether the interval by the clock that decides is narrow enough."""
        deciding = self.cpu if contended and self.cpu is not None else self.wall
        return statistics.compare(deciding).width <= (PRECISE_CONTENDED if contended else PRECISE)


@dataclass(frozen=True)
class Judged:
    """The ratio that counts with the interval that holds everything known, by `clock`; and what each clock saw."""

    clock: Clock
    compared: Comparison
    spread: float
    """Two runs of one program may differ by this share here: `compared` holds it already."""
    wall: Comparison
    cpu: Comparison | None

    @property
    def finding(self) -> statistics.Finding:
        return statistics.finding(self.compared)

    def times(self, factor: float) -> Judged:
        """The same of quantities of which one is so many times larger."""
        return replace(self, compared=self.compared.times(factor))


def judge(pair: Ratios, itself: Ratios, *, contended: bool, threads: int) -> Judged:
    """Compare by rounds; `itself` are those of the original against itself, of the same moments where there are such.

    With several `threads` processor time is no latency: both clocks' intervals count. So they do where they contradict
    each other, as with a program that sleeps.
    """
    wall, wall_spread = _widened(pair.wall, itself.wall, _shift(pair.wall_moved, contended))
    if pair.cpu is None or itself.cpu is None:
        return Judged("wall", wall, wall_spread, statistics.compare(pair.wall), None)
    cpu, cpu_spread = _widened(pair.cpu, itself.cpu, _shift(pair.cpu_moved, contended))
    seen = statistics.compare(pair.wall), statistics.compare(pair.cpu)
    if not contended:
        return Judged("wall", wall, wall_spread, *seen)
    if threads == 1 and wall.overlaps(cpu):
        return Judged("cpu", cpu, cpu_spread, *seen)
    hull = Comparison(wall.ratio, min(wall.low, cpu.low), max(wall.high, cpu.high))
    return Judged("both", hull, max(wall_spread, cpu_spread), *seen)


def _shift(moved: float, contended: bool) -> float:
    return max(SHIFT, math.expm1(min(REACH * moved, _MOST))) if contended else 0.0


def _widened(pair: Sequence[float], itself: Sequence[float], shift: float) -> tuple[Comparison, float]:
    share = (1 + statistics.spread(itself)) * (1 + shift) - 1
    return statistics.compare(pair).widened(share), share
