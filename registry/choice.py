"""Which variant a kind of host gets: the best of those that were measured on it, if it beats the original. Pure.

Latency and throughput go by ratios to the original, measured in one run: those are facts on a busy machine too. The
figures of two runs stand in where nobody measured a ratio. Differences below the A/A spread are no difference. A limit
is met only by an absolute figure of a machine that did nothing else; memory is the same on any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weighbridge.registry.recipe import Objective

ORIGINAL = "original"
_ERRORS = ("mse", "mae", "perplexity")
_MIB = 1 << 20
AGAIN = "`weighbridge benchmark retry` measures again"


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
    speedup: float | None = None
    """The original's latency over its own, in one run; None: that of the two p99."""
    throughput_ratio: float | None = None
    """Its throughput over the original's, in one run; None: that of the two figures."""
    speedup_interval: tuple[float, float] | None = None
    throughput_interval: tuple[float, float] | None = None
    contended: str = ""
    """What else took the machine while it was measured; then p99 and throughput are no facts."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The variant, why in words, and the names of the Pareto front."""

    variant: str
    reason: str
    front: tuple[str, ...]


def front(candidates: Sequence[Candidate]) -> list[str]:
    """Name those that no other one beats: as good in quality, latency, throughput and memory, and better in one."""
    base = next((one for one in candidates if one.variant == ORIGINAL), candidates[0])
    seen = [(one, _gains(one, base)) for one in candidates]
    kept = [one.variant for one, mine in seen if not any(_dominates(other, its, one, mine) for other, its in seen)]
    # "No difference" is not transitive: in a ring of such neighbours nobody is best.
    return kept or [one.variant for one in candidates]


def choose(candidates: Sequence[Candidate], objective: Objective, metric: str = "accuracy") -> Chosen:
    """Choose for one kind of device among candidates of which one is the original. `metric` is for the words.

    The best by the objective within its limits, if it beats the original by more than the spread; among equals the one
    of better quality, then the smaller. Where the original misses a limit, the best that meets it; where that is not
    known, it stays unless it is beaten. Raises StopIteration where the original is not among them.
    """
    original = next(one for one in candidates if one.variant == ORIGINAL)
    on_front = tuple(front(candidates))
    missed = _missed(original, objective)
    meeting = [one for one in candidates if one is not original and not _missed(one, objective)]
    proven = missed and not _unknown(original, objective)
    if missed and not meeting:
        others = "so does every variant measured here" if proven else "no variant measured here is known to"
        return Chosen(ORIGINAL, f"the original {missed}, and {others}", on_front)
    better = meeting if proven else [one for one in meeting if _beats(one, original, objective)]
    if not better:
        return Chosen(ORIGINAL, _no_better(original, candidates, meeting, objective), on_front)
    best = _best(better, original, objective)
    reason = _words(original, best, objective, metric)
    return Chosen(best.variant, f"the original {missed}; {reason}" if missed else reason, on_front)


def _dominates(a: Candidate, gains: Mapping[str, float], b: Candidate, other_gains: Mapping[str, float]) -> bool:
    tolerance = 1 + _spread(a, b)
    ratios = [gains[name] / other_gains[name] for name in ("latency", "throughput", "memory")]
    no_worse = _quality(a) >= _quality(b) and all(ratio >= 1 / tolerance for ratio in ratios)
    return no_worse and (_quality(a) > _quality(b) or any(ratio > tolerance for ratio in ratios))


def _spread(a: Candidate, b: Candidate) -> float:
    return max(a.spread, b.spread)


def _quality(one: Candidate) -> float:
    """More than the original is chance: counts as the same."""
    return 0.0 if one.quality is None else min(one.quality, 1.0)


def _gains(one: Candidate, original: Candidate) -> dict[str, float]:
    """What each objective wants the most of, as multiples of the original's."""
    figures = {"latency": original.p99 / one.p99, "throughput": one.throughput / original.throughput}
    if one.contended or original.contended:
        figures = {"latency": 1.0, "throughput": 1.0}  # of different moments of a busy machine: they say nothing
    return {
        "latency": figures["latency"] if one.speedup is None else one.speedup,
        "throughput": figures["throughput"] if one.throughput_ratio is None else one.throughput_ratio,
        "memory": original.memory / one.memory,
        "quality": _quality(one) / _quality(original) if _quality(original) else 1.0,
    }


def _beats(one: Candidate, original: Candidate, objective: Objective) -> bool:
    """By its whole interval, or by more than the spread where there is none."""
    if objective.best == "latency" and one.finding:
        return one.finding == "faster"
    if objective.best == "throughput" and one.throughput_interval is not None:
        return one.throughput_interval[0] > 1
    return _gains(one, original)[objective.best] > 1 + _spread(one, original)


def _best(better: Sequence[Candidate], original: Candidate, objective: Objective) -> Candidate:
    value = {one.variant: _gains(one, original)[objective.best] for one in better}
    first = max(better, key=lambda one: value[one.variant])
    exact = objective.best == "quality"
    least = value[first.variant]
    equals = [one for one in better if value[one.variant] * (1 if exact else 1 + _spread(first, one)) >= least]
    return min(equals, key=lambda one: (-_quality(one), one.size, -value[one.variant], one.variant))


def _unknown(one: Candidate, objective: Objective) -> bool:
    """Whether a limit on figures that are no facts is all that it can be missing."""
    memory = objective.max_memory is not None and one.memory > objective.max_memory
    return bool(one.contended) and not memory


def _missed(one: Candidate, objective: Objective) -> str:
    """`misses` the limits, or `is not known to meet` them, in words; empty where it meets all."""
    missed = []
    busy = f"measured beside other work: {AGAIN}"
    verb = "is not known to meet" if _unknown(one, objective) else "misses"
    if objective.max_p99 is not None and (one.contended or one.p99 > objective.max_p99):
        seen = busy if one.contended else _time(one.p99)
        missed.append(f"max_p99 ({seen}, at most {_time(objective.max_p99)})")
    if objective.min_throughput is not None and (one.contended or one.throughput < objective.min_throughput):
        seen = busy if one.contended else f"{one.throughput:,.0f} rows/s"
        missed.append(f"min_throughput ({seen}, at least {objective.min_throughput:,.0f})")
    if objective.max_memory is not None and one.memory > objective.max_memory:
        missed.append(f"max_memory ({_mib(one.memory)}, at most {_mib(objective.max_memory)})")
    return f"{verb} {' and '.join(missed)}" if missed else ""


def _no_better(
    original: Candidate, candidates: Sequence[Candidate], meeting: Sequence[Candidate], objective: Objective
) -> str:
    if len(candidates) == 1:
        return "no other variant was measured here"
    if not meeting:
        others = [one for one in candidates if one is not original]
        return f"no variant meets the limits: {others[0].variant} {_missed(others[0], objective)}"
    best = _best(meeting, original, objective)
    spread = f"the spread of {_spread(original, best):.1%}"
    busy = original.contended or best.contended
    p99 = f"p99 {_time(best.p99)} against {_time(original.p99)}{_interval(best.speedup_interval)}"
    rows = f"{best.throughput:,.0f} rows/s against {original.throughput:,.0f}{_interval(best.throughput_interval)}"
    figures = {
        "latency": _latency(original, best) if busy else p99,
        "throughput": _throughput(original, best) if busy else rows,
        "memory": f"{_mib(best.memory)} against {_mib(original.memory)}",
        "quality": "none keeps more than all of it",
    }
    return (
        f"no variant beats the original by more than {spread}: {best.variant} comes nearest, "
        + (figures[objective.best])
    )


def _words(original: Candidate, best: Candidate, objective: Objective, metric: str) -> str:
    """The figure of the objective first, then those that it limits."""
    figures = {
        "latency": _latency(original, best),
        "throughput": _throughput(original, best),
        "memory": f"peak memory {_mib(best.memory)} instead of {_mib(original.memory)}",
    }
    limits = {"latency": objective.max_p99, "throughput": objective.min_throughput, "memory": objective.max_memory}
    named = [objective.best, *(name for name, limit in limits.items() if limit is not None and name != objective.best)]
    return ", ".join([*(figures[name] for name in named if name in figures), _kept(best, metric)])


def _latency(original: Candidate, one: Candidate) -> str:
    """The ratio with its interval, and p99 where it is a fact."""
    faster = _times(_gains(one, original)["latency"], "faster", "slower") + " the original"
    ratio = f"{faster}{_interval(one.speedup_interval)}"
    if one.contended:
        return f"{ratio}, measured beside other work ({one.contended})"
    if one.speedup is None:
        return f"p99 {_time(one.p99)}, {faster}'s {_time(original.p99)}"
    return f"p99 {_time(one.p99)}, {ratio}"


def _throughput(original: Candidate, one: Candidate) -> str:
    more = _times(_gains(one, original)["throughput"], "more", "less") + " the original"
    ratio = f"{more}{_interval(one.throughput_interval)}"
    if one.contended:
        return f"{ratio} in rows/s, measured beside other work ({one.contended})"
    if one.throughput_ratio is None:
        return f"{one.throughput:,.0f} rows/s, {more}'s {original.throughput:,.0f}"
    return f"{one.throughput:,.0f} rows/s, {ratio}"


def _interval(ends: tuple[float, float] | None) -> str:
    """Of how many times the original's speed it can be; 1 in it: perhaps none."""
    if ends is None:
        return ""
    return f" ({ends[0]:.2f}–{ends[1]:.2f} × its speed)"


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
