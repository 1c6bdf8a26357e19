"""Which variant a kind of host gets: only a measured gain beyond the spread moves it away from the original."""

from __future__ import annotations

from typing import Any

import pytest

from weighbridge.registry.choice import Candidate, choose, front
from weighbridge.registry.recipe import Objective

LATENCY, MIB = Objective(), 1 << 20
BASE: dict[str, Any] = {"quality": 1.0, "p99": 0.56e-3, "throughput": 10_000.0, "memory": 100 * MIB, "size": 400}


def candidate(variant: str = "original", **changes: Any) -> Candidate:
    return Candidate(**{"variant": variant, "artifact": variant * 2, "spread": 0.05, **BASE, **changes})


ORIGINAL = candidate()
INT8 = candidate("int8", quality=0.997, p99=0.18e-3, throughput=30_000.0, memory=40 * MIB, size=100, finding="faster")


def test_the_fastest_that_passed_is_chosen_with_its_numbers() -> None:
    """The reason names latency, gain and quality."""
    chosen = choose([ORIGINAL, INT8], LATENCY)
    assert chosen.variant == "int8"
    assert chosen.reason == "p99 0.18 ms, 3.1 × faster than the original's 0.56 ms, keeps 99.7% of its accuracy"
    assert chosen.front == ("original", "int8")


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (Objective(best="throughput"), "30,000 rows/s, 3.0 × more than the original's 10,000, keeps 99.7% by its mse"),
        (Objective(best="memory"), "peak memory 40.0 MiB instead of 100.0 MiB, keeps 99.7% by its mse"),
        (
            Objective(best="throughput", max_memory=50 * MIB),
            "the original misses max_memory (100.0 MiB, at most 50.0 MiB); 30,000 rows/s, 3.0 × more than the "
            "original's 10,000, peak memory 40.0 MiB instead of 100.0 MiB, keeps 99.7% by its mse",
        ),
    ],
)
def test_every_objective_has_its_figures(objective: Objective, reason: str) -> None:
    """The objective's first, then those that it limits."""
    assert choose([ORIGINAL, INT8], objective, "mse").reason == reason


def test_what_the_spread_hides_is_no_gain() -> None:
    """4% faster at a spread of 5% leaves the original, and the reason says by how little."""
    near = candidate("bf16", p99=0.54e-3)
    chosen = choose([ORIGINAL, near], LATENCY)
    assert (chosen.variant, chosen.reason) == (
        "original",
        "no variant beats the original by more than the spread of 5.0%: bf16 comes nearest, p99 0.54 ms against "
        "0.56 ms",
    )
    assert choose([ORIGINAL, candidate("bf16", p99=0.4e-3, finding="same")], LATENCY).variant == "original"
    lucky = candidate("bf16", throughput=20_000.0, throughput_ratio=1.01)
    assert choose([ORIGINAL, lucky], Objective(best="throughput")).variant == "original"


def test_among_equals_quality_and_then_size_decide() -> None:
    """Two that are as fast within the spread: the better one; as good: the smaller one."""
    fast = candidate("a", quality=0.990, p99=0.200e-3, size=10)
    good = candidate("b", quality=0.999, p99=0.205e-3, size=90)
    small = candidate("c", quality=0.999, p99=0.208e-3, size=50)
    assert choose([ORIGINAL, fast, good, small], LATENCY).variant == "c"
    assert choose([ORIGINAL, fast, good], LATENCY).variant == "b"
    assert choose([ORIGINAL, fast, candidate("b", quality=0.999, p99=0.3e-3)], LATENCY).variant == "a"


def test_limits_exclude() -> None:
    """What misses a limit is not chosen, however good it is at the objective."""
    hungry = candidate("hungry", p99=0.1e-3, memory=900 * MIB)
    assert choose([ORIGINAL, INT8, hungry], Objective(max_memory=200 * MIB)).variant == "int8"
    none = choose([ORIGINAL, hungry], Objective(max_memory=200 * MIB))
    assert none.variant == "original"
    assert none.reason == "no variant meets the limits: hungry misses max_memory (900.0 MiB, at most 200.0 MiB)"


def test_an_original_that_misses_a_limit_is_replaced() -> None:
    """By the best that meets it, also where that is slower; by nothing where none does, which is said."""
    slow = candidate("slow", p99=0.7e-3, memory=40 * MIB, finding="slower")
    small = choose([ORIGINAL, slow], Objective(max_memory=50 * MIB))
    assert small.variant == "slow"
    assert small.reason.startswith("the original misses max_memory (100.0 MiB, at most 50.0 MiB); p99 0.70 ms, 1.2 × ")
    none = choose([ORIGINAL, INT8], Objective(max_p99=1e-5, min_throughput=1e9))
    assert none.variant == "original"
    assert none.reason == (
        "the original misses max_p99 (0.56 ms, at most 0.01 ms) and min_throughput (10,000 rows/s, at least "
        "1,000,000,000), and so does every variant measured here"
    )


def test_quality_keeps_the_original() -> None:
    """Nothing keeps more than all of it: luck above the original does not count, unless a limit drives it away."""
    lucky = candidate("lucky", quality=1.02, p99=0.1e-3)
    assert choose([ORIGINAL, lucky], Objective(best="quality")).variant == "original"
    assert choose([ORIGINAL, lucky, INT8], Objective(best="quality", max_p99=0.2e-3)).variant == "lucky"


def test_alone_the_original_says_so() -> None:
    """A version without variants, or whose variants all failed."""
    chosen = choose([ORIGINAL], LATENCY)
    assert (chosen.variant, chosen.reason, chosen.front) == (
        "original",
        "no other variant was measured here",
        ("original",),
    )


def test_the_front_is_what_nothing_beats() -> None:
    """Dominated: worse in one and better in none; differences within the spread are none."""
    worse = candidate("worse", quality=0.9, p99=0.19e-3, throughput=29_500.0, memory=40 * MIB)
    drift = candidate("drift", quality=None, p99=0.18e-3, throughput=30_000.0, memory=40 * MIB)
    frugal = candidate("frugal", quality=0.5, memory=10 * MIB)
    assert front([ORIGINAL, INT8, worse, drift, frugal]) == ["original", "int8", "frugal"]
    assert front([candidate("a"), candidate("b", p99=0.57e-3)]) == ["a", "b"]


def test_a_ring_of_neighbours_is_the_front() -> None:
    """Where "no difference" beside "better" goes round, nobody is best, and nobody is forgotten."""
    ring = [
        candidate("a", p99=1.08, throughput=108.0, memory=104),
        candidate("b", p99=1.04, throughput=100.0, memory=100),
        candidate("c", p99=1.00, throughput=104.0, memory=108),
    ]
    assert front(ring) == ["a", "b", "c"]


BUSY = "other processes took 48% of the processors"
FASTER: dict[str, Any] = {"finding": "faster", "speedup": 3.5, "speedup_interval": (3.1, 4.0)}


def test_a_ratio_decides_whatever_the_figures_of_a_busy_machine_say() -> None:
    """Its own p99 looks worse than the original's of a quiet hour; in one run it was 3.5 × faster."""
    slow = candidate("onnx", p99=9e-3, throughput=500.0, throughput_ratio=2.0, throughput_interval=(1.7, 2.4),
                     contended=BUSY, **FASTER)  # fmt: skip
    chosen = choose([ORIGINAL, slow], LATENCY)
    assert (chosen.variant, chosen.front) == ("onnx", ("onnx",))
    assert chosen.reason == (
        f"3.5 × faster than the original (3.10–4.00 × its speed), measured beside other work ({BUSY}), "
        "keeps 100.0% of its accuracy"
    )
    assert choose([ORIGINAL, slow], Objective(best="throughput")).variant == "onnx"
    unsure = candidate("onnx", throughput_ratio=2.0, throughput_interval=(0.9, 2.4), contended=BUSY)
    assert choose([ORIGINAL, unsure], Objective(best="throughput")).variant == "original"
    lucky = candidate("onnx", p99=1e-6, contended=BUSY)
    assert choose([ORIGINAL, lucky], LATENCY).variant == "original", "a figure of a busy machine, without a ratio"


def test_figures_of_a_busy_machine_meet_no_limit() -> None:
    """However good; whoever reads it is told how to measure again. Memory is the same on any machine."""
    fast = candidate("onnx", p99=1e-6, throughput=1e9, contended=BUSY, **FASTER)
    for limits in ({"max_p99": 1.0}, {"min_throughput": 1.0}):
        chosen = choose([ORIGINAL, fast], Objective(**limits))
        assert chosen.variant == "original"
        assert "measured beside other work: `weighbridge benchmark retry` measures again" in chosen.reason
    assert choose([ORIGINAL, fast], Objective(max_memory=200 * MIB)).variant == "onnx"


def test_an_original_that_nobody_could_judge_stays_unless_it_is_beaten() -> None:
    """It may meet the limit: a slower variant that is known to meet it does not replace it, a faster one does."""
    original, limit = candidate(contended=BUSY), Objective(max_p99=1e-3)
    slower = candidate("small", p99=0.7e-3, finding="slower", speedup=0.8)
    assert choose([original, slower], limit).variant == "original"
    assert choose([original, candidate("onnx", contended=BUSY)], limit).reason == (
        "the original is not known to meet max_p99 (measured beside other work: `weighbridge benchmark retry` measures "
        "again, at most 1.00 ms), and no variant measured here is known to"
    )
    assert choose([original, candidate("onnx", p99=0.2e-3, **FASTER)], limit).variant == "onnx"
    hungry = candidate(contended=BUSY, memory=900 * MIB)
    assert choose([hungry, slower], Objective(max_p99=1e-3, max_memory=200 * MIB)).variant == "small"


def test_the_best_goes_by_ratios_not_by_the_hour_of_its_figures() -> None:
    """Two variants of different runs: the larger ratio wins over the smaller p99."""
    quiet = candidate("a", p99=0.2e-3, finding="faster", speedup=2.0)
    busy = candidate("b", p99=0.4e-3, finding="faster", speedup=4.0)
    assert choose([ORIGINAL, quiet, busy], LATENCY).variant == "b"
