"""Which variant a kind of host gets: the best of those that were measured on it, if it beats the original. Pure.

Measured differences below the A/A spread are no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weighbridge.registry.recipe import Objective

ORIGINAL = "original"
_ERRORS = ("mse", "mae", "perplexity")
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready variant with what was validly measured of it on one kind of device."""

    variant: str
    artifact: str
    quality: float | None
    """Share of the original kept; the original's is 1. None: only its drift was judged; counts as the least."""
    p99: float
    """Seconds, SingleStream."""
    throughput: float
    """Rows a second, Offline."""
    memory: int
    """Peak bytes."""
    size: int = 0
    """Bytes of its weights."""
    spread: float = 0.0
    """Of the A/A run, as a share."""
    finding: str = ""
    """faster, slower, same, or empty where nobody knows: its SingleStream latency beside the original's, in one run.
    Overrules two p99 of different runs."""
    throughput_ratio: float | None = None
    """Its throughput over the original's, in one run; None: that of the two figures."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The variant, why in words, and the names of the Pareto front."""

    variant: str
    reason: str
    front: tuple[str, ...]


def front(candidates: Sequence[Candidate]) -> list[str]:
    """Name those that no other one beats: as good in quality, p99, throughput and memory, and better in one of them."""
    kept = [one.variant for one in candidates if not any(_dominates(other, one) for other in candidates)]
    # "No difference" is not transitive: in a ring of such neighbours nobody is best.
    return kept or [one.variant for one in candidates]


def choose(candidates: Sequence[Candidate], objective: Objective, metric: str = "accuracy") -> Chosen:
    """Choose for one kind of device among candidates of which one is the original. `metric` is for the words.

    The best by the objective within its limits, if it beats the original by more than the spread; among equals the one
    of better quality, then the smaller. Where the original misses a limit, the best that meets it. Raises StopIteration
    where the original is not among them.
    """
    original = next(one for one in candidates if one.variant == ORIGINAL)
    on_front = tuple(front(candidates))
    missed = _missed(original, objective)
    meeting = [one for one in candidates if one is not original and not _missed(one, objective)]
    if missed and not meeting:
        return Chosen(ORIGINAL, f"the original misses {missed}, and so does every variant measured here", on_front)
    better = meeting if missed else [one for one in meeting if _beats(one, original, objective)]
    if not better:
        return Chosen(ORIGINAL, _no_better(original, candidates, meeting, objective), on_front)
    best = _best(better, objective)
    reason = _words(original, best, objective, metric)
    return Chosen(best.variant, f"the original misses {missed}; {reason}" if missed else reason, on_front)


def _dominates(a: Candidate, b: Candidate) -> bool:
    tolerance = 1 + _spread(a, b)
    ratios = (b.p99 / a.p99, a.throughput / b.throughput, b.memory / a.memory)
    no_worse = _quality(a) >= _quality(b) and all(ratio >= 1 / tolerance for ratio in ratios)
    return no_worse and (_quality(a) > _quality(b) or any(ratio > tolerance for ratio in ratios))


def _spread(a: Candidate, b: Candidate) -> float:
    return max(a.spread, b.spread)


def _quality(one: Candidate) -> float:
    """More than the original is chance: counts as the same."""
    return 0.0 if one.quality is None else min(one.quality, 1.0)


_VALUE: dict[str, Callable[[Candidate], float]] = {
    "latency": lambda one: 1 / one.p99,
    "throughput": lambda one: one.throughput,
    "memory": lambda one: 1 / one.memory,
    "quality": _quality,
}
"""What each objective wants the most of."""


def _beats(one: Candidate, original: Candidate, objective: Objective) -> bool:
    """By more than the spread; what was measured beside the original in one run counts for more than two runs."""
    if objective.best == "latency" and one.finding in ("same", "slower"):
        return False
    value = _VALUE[objective.best]
    gain = value(one) / value(original)
    if objective.best == "throughput" and one.throughput_ratio is not None:
        gain = one.throughput_ratio
    return gain > 1 + _spread(one, original)


def _best(better: Sequence[Candidate], objective: Objective) -> Candidate:
    value = _VALUE[objective.best]
    first = max(better, key=value)
    exact = objective.best == "quality"
    equals = [one for one in better if value(one) * (1 if exact else 1 + _spread(first, one)) >= value(first)]
    return min(equals, key=lambda one: (-_quality(one), one.size, -value(one), one.variant))


def _missed(one: Candidate, objective: Objective) -> str:
    """The limits that it misses, in words."""
    missed = []
    if objective.max_p99 is not None and one.p99 > objective.max_p99:
        missed.append(f"max_p99 ({_time(one.p99)}, at most {_time(objective.max_p99)})")
    if objective.min_throughput is not None and one.throughput < objective.min_throughput:
        missed.append(f"min_throughput ({one.throughput:,.0f} rows/s, at least {objective.min_throughput:,.0f})")
    if objective.max_memory is not None and one.memory > objective.max_memory:
        missed.append(f"max_memory ({_mib(one.memory)}, at most {_mib(objective.max_memory)})")
    return " and ".join(missed)


def _no_better(
    original: Candidate, candidates: Sequence[Candidate], meeting: Sequence[Candidate], objective: Objective
) -> str:
    if len(candidates) == 1:
        return "no other variant was measured here"
    if not meeting:
        others = [one for one in candidates if one is not original]
        return f"no variant meets the limits: {others[0].variant} misses {_missed(others[0], objective)}"
    best = _best(meeting, objective)
    spread = f"the spread of {_spread(original, best):.1%}"
    nearest = f"{best.variant} comes nearest"
    figures = {
        "latency": f"p99 {_time(best.p99)} against {_time(original.p99)}",
        "throughput": f"{best.throughput:,.0f} rows/s against {original.throughput:,.0f}",
        "memory": f"{_mib(best.memory)} against {_mib(original.memory)}",
        "quality": "none keeps more than all of it",
    }
    return f"no variant beats the original by more than {spread}: {nearest}, {figures[objective.best]}"


def _words(original: Candidate, best: Candidate, objective: Objective, metric: str) -> str:
    """The figure of the objective first, then those that it limits."""
    faster = _times(original.p99 / best.p99, "faster", "slower")
    more = _times(best.throughput / original.throughput, "more", "less")
    figures = {
        "latency": f"p99 {_time(best.p99)}, {faster} the original's {_time(original.p99)}",
        "throughput": f"{best.throughput:,.0f} rows/s, {more} the original's {original.throughput:,.0f}",
        "memory": f"peak memory {_mib(best.memory)} instead of {_mib(original.memory)}",
    }
    limits = {"latency": objective.max_p99, "throughput": objective.min_throughput, "memory": objective.max_memory}
    named = [objective.best, *(name for name, limit in limits.items() if limit is not None and name != objective.best)]
    return ", ".join([*(figures[name] for name in named if name in figures), _kept(best, metric)])


def _kept(one: Candidate, metric: str) -> str:
    if one.quality is None:
        return "judged by its drift"
    return f"keeps {one.quality:.1%} {'by' if metric in _ERRORS else 'of'} its {metric}"


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f} × {more} than" if ratio >= 1 else f"{1 / ratio:.1f} × {less} than"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
