"""The share that a variant keeps, and how sure that is: known values, scikit-learn's, scipy's, and coverage."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from weighbridge.registry.recipe import MetricName
from weighbridge.workers.evaluation import bootstrap
from weighbridge.workers.evaluation.bootstrap import kept

RNG = np.random.default_rng(0)
ROWS = 300
LABELS = RNG.integers(0, 4, ROWS)
FIRST, SECOND = (np.where(RNG.random(ROWS) < right, LABELS, RNG.integers(0, 4, ROWS)) for right in (0.9, 0.8))
CLASSES = np.column_stack([LABELS, FIRST, SECOND]).astype(float)
TARGETS = RNG.standard_normal((ROWS, 2))
GUESSES = [TARGETS + scale * RNG.standard_normal((ROWS, 2)) for scale in (0.1, 0.2)]


def means(first: Any, second: Any) -> Any:
    return np.column_stack([first, second, np.ones(len(first))]).astype(float)


def squares(*guesses: Any) -> Any:
    return np.hstack([TARGETS, *((guess - TARGETS) ** 2 for guess in guesses)])


@pytest.mark.parametrize("metric", get_args(MetricName))
def test_an_original_keeps_all_of_itself(metric: MetricName) -> None:
    """Exactly 1, bound included, whatever the metric."""
    losses = RNG.random(ROWS)
    rows = {"r2": squares(GUESSES[0], GUESSES[0])}.get(metric, means(losses, losses))
    if metric in ("precision", "recall", "f1"):
        rows = CLASSES[:, [0, 1, 1]]
    found = kept(metric, rows, confidence=0.95, resamples=200)
    assert (found.share, found.bound) == (1.0, 1.0)


def test_scores_equal_scikit_learn() -> None:
    """Macro precision, recall and F1, and R² as the mean over outputs, of both models."""
    metrics = pytest.importorskip("sklearn.metrics")
    for at, metric in enumerate(("precision", "recall", "f1")):
        found = kept(metric, CLASSES, confidence=0.95, resamples=10)
        for seen, guess in ((found.original, FIRST), (found.variant, SECOND)):
            wanted = metrics.precision_recall_fscore_support(LABELS, guess, average="macro", zero_division=0)[at]
            assert seen == pytest.approx(wanted)
    found = kept("r2", squares(*GUESSES), confidence=0.95, resamples=10)
    assert [found.original, found.variant] == pytest.approx([metrics.r2_score(TARGETS, one) for one in GUESSES])


def test_an_error_keeps_the_reverse() -> None:
    """Half again the error keeps two thirds; perplexity is e to the mean loss; no error at all divides by nothing."""
    assert kept("mse", means(np.full(9, 2.0), np.full(9, 3.0)), confidence=0.95).share == pytest.approx(2 / 3)
    found = kept("perplexity", means(np.full(9, 1.0), np.full(9, 1.5)), confidence=0.95)
    assert (found.original, found.share) == (pytest.approx(np.e), pytest.approx(np.exp(-0.5)))
    nothing, some = np.zeros(9), np.ones(9)
    assert [kept("mae", means(*pair), confidence=0.95).share for pair in ((nothing, nothing), (nothing, some))] == [
        1,
        0,
    ]
    assert kept("mae", means(some, nothing), confidence=0.95).share == 1


def test_the_bound_equals_scipy() -> None:
    """Its paired percentile bootstrap of the same ratio, within the noise of resampling."""
    stats = pytest.importorskip("scipy.stats")
    first, second = (guess == LABELS for guess in (FIRST, SECOND))
    theirs = stats.bootstrap(
        (first, second),
        lambda a, b, axis: b.mean(axis) / a.mean(axis),
        paired=True,
        alternative="greater",
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    )
    ours = kept("accuracy", means(first, second), confidence=0.95, resamples=4000)
    assert ours.bound == pytest.approx(theirs.confidence_interval.low, abs=4e-3)


def test_rows_that_differ_are_drawn_as_those_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of drawing, and any size of the parts in memory, give the same distribution."""
    first, second = (guess == LABELS for guess in (FIRST, SECOND))
    alike = kept("accuracy", means(first, second), confidence=0.95)
    distinct = means(first, second) + 1e-9 * np.arange(ROWS)[:, None]
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 7 * ROWS)
    assert kept("accuracy", distinct, confidence=0.95).bound == pytest.approx(alike.bound, abs=5e-3)


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Of 300 evaluation sets, 90% bounds are below the true share in about 270."""
    rng = np.random.default_rng(3)
    held = 0
    for seed in range(300):
        first = rng.random(400) < 0.9
        second = np.where(rng.random(400) < 0.95, first, rng.random(400) < 0.5)
        truth = (0.95 * 0.9 + 0.05 * 0.5) / 0.9
        held += kept("accuracy", means(first, second), confidence=0.9, seed=seed, resamples=400).bound <= truth
    assert 255 <= held <= 285
