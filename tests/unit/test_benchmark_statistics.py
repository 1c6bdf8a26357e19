"""What benchmark numbers mean: what a spread hides, when p99 is proven, when a process is warm."""

from __future__ import annotations

import numpy as np
import pytest

from weighbridge.workers.benchmarking import statistics
from weighbridge.workers.benchmarking.statistics import compare, finding, histogram, is_flat, queries_needed, spread


def test_the_original_against_itself_is_the_same_whatever_the_noise() -> None:
    """The spread of an A/A run covers its own ratios by construction."""
    for seed in range(50):
        ratios = np.random.default_rng(seed).lognormal(0.03, 0.1, 7).tolist()
        assert finding(compare(ratios), spread(ratios)) == "same"


def test_a_difference_needs_the_whole_interval_beyond_the_spread() -> None:
    """A few percent are no difference even on a perfectly quiet machine; noise hides more."""
    quiet = spread([1.0] * 8)
    assert quiet == statistics.MIN_SPREAD
    assert finding(compare([1.015] * 8), quiet) == "same"
    assert finding(compare([1.5, 1.52, 1.49, 1.51, 1.5]), quiet) == "faster"
    assert finding(compare([0.7, 0.71, 0.69, 0.7, 0.7]), quiet) == "slower"
    assert finding(compare([0.9, 1.9, 1.0, 1.8, 1.5]), quiet) == "same"
    assert finding(compare([1.2] * 8), spread([1.0, 1.3, 0.8, 1.4, 1.3, 1.25, 1.35])) == "same"


def test_early_stopping_is_that_of_mlperf() -> None:
    """p99 with no miss takes 459 queries, p90 takes 44; each miss takes more."""
    needed = queries_needed(1000)
    assert needed[0] == 459
    assert queries_needed(60, quantile=0.9)[0] == 44
    assert needed[:3] == [459, 662, 838]


def test_a_histogram_keeps_every_latency_within_its_bound() -> None:
    """Any percentile can be read from it later, to 12%."""
    latencies = np.random.default_rng(0).lognormal(-8, 1, 5000)
    counts = histogram(latencies.tolist())
    assert sum(counts.values()) == 5000
    bounds = sorted(float(bound) for bound in counts)
    half = next(bound for bound in bounds if sum(n for b, n in counts.items() if float(b) <= bound) >= 2500)
    assert np.median(latencies) == pytest.approx(half, rel=0.13)
    assert histogram([0.001, 0.001]) == {"0.001": 2}


def test_warm_is_when_the_median_stands_still() -> None:
    """Outliers do not count, a trend does."""
    assert not is_flat([1.0] * 7, 4)
    assert is_flat([9.0, 5.0, 1.0, 1.0, 1.0, 30.0, 1.0, 1.0, 1.0, 1.0], 4)
    assert not is_flat([2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3], 4)
