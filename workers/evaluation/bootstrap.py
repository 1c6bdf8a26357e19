"""The share of a metric that a variant keeps, with the lower end of a one-sided paired percentile bootstrap interval.

Both models answer the same rows, so a resample draws rows, each with both its scores: what is hard for one is hard for
the other, and the share varies far less than either metric (Efron and Tibshirani, *An Introduction to the Bootstrap*,
1993, chapter 13). Rows that are alike are drawn together from a multinomial, which is the same distribution: the
accuracy of any number of rows is four kinds of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weighbridge.registry.recipe import MetricName
from weighbridge.workers.classification import macro

Floats = npt.NDArray[np.float64]
ERRORS: frozenset[str] = frozenset({"mse", "mae", "perplexity"})
"""Metrics of which less is better."""
RESAMPLES = 2000
_AT_ONCE = 4 << 20
"""Weights of rows in memory at once: 32 MB."""


@dataclass(frozen=True)
class Kept:
    """`share` of the original's metric (for an error the original's over the variant's) and its lower `bound`."""

    metric: MetricName
    original: float
    variant: float
    share: float
    bound: float


def kept(metric: MetricName, rows: Floats, *, confidence: float, seed: int = 0, resamples: int = RESAMPLES) -> Kept:
    """Compare over rows [n, terms]; what the terms are depends on the metric.

    precision, recall, f1: label, original's class, variant's class. r2: k targets, then k squared errors of the
    original, then of the variant. All others: the original's sum, the variant's sum, and the count that divides both.
    """
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    original, variant = _estimate(metric, kinds, counts[None].astype(np.float64))
    drawn = [
        _shares(metric, *_estimate(metric, kinds, weights)) for weights in _weights(counts, len(rows), resamples, seed)
    ]
    bound = float(np.quantile(np.concatenate(drawn), 1 - confidence))
    share = float(_shares(metric, original, variant)[0])
    return Kept(metric, float(original[0]), float(variant[0]), share, bound)


def _weights(counts: npt.NDArray[np.int64], rows: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each kind of row is drawn, [resamples at once, kinds]."""
    rng, kinds = np.random.default_rng(seed), len(counts)
    few = kinds * 8 <= rows  # a binomial costs ten times a uniform integer
    step = max(1, _AT_ONCE // (kinds if few else rows))
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    of_row = np.searchsorted(starts, np.arange(rows), side="right") - 1
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        if few:
            yield rng.multinomial(rows, counts / rows, size=size).astype(np.float64)
            continue
        picked = of_row[rng.integers(0, rows, (size, rows))] + kinds * np.arange(size)[:, None]
        yield np.bincount(picked.ravel(), minlength=size * kinds).reshape(size, kinds).astype(np.float64)


def _shares(metric: MetricName, original: Floats, variant: Floats) -> Floats:
    """variant / original, or the reverse for an error. Where that divides by 0 nothing is lost: 1; by less: 0."""
    part, whole = (original, variant) if metric in ERRORS else (variant, original)
    shares: Floats = np.divide(part, whole, out=(whole == 0).astype(np.float64), where=whole > 0)
    shares[original == variant] = 1.0
    return shares


def _estimate(metric: MetricName, kinds: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The metric of both models for each row of weights [resamples, kinds]."""
    if metric in ("precision", "recall", "f1"):
        return _macro(metric, kinds, weights, 1), _macro(metric, kinds, weights, 2)
    if metric == "r2":
        width = kinds.shape[1] // 3
        targets, first, second = (kinds[:, at : at + width] for at in (0, width, 2 * width))
        return _r2(targets, first, weights), _r2(targets, second, weights)
    sums = weights @ kinds
    count = np.maximum(sums[:, 2], np.finfo(np.float64).tiny)
    original, variant = sums[:, 0] / count, sums[:, 1] / count
    return (_exp(original), _exp(variant)) if metric == "perplexity" else (original, variant)


def _exp(mean: Floats) -> Floats:
    """The largest double is e^709."""
    powers: Floats = np.exp(np.minimum(mean, 709.0))
    return powers


def _r2(targets: Floats, squares: Floats, weights: Floats) -> Floats:
    """1 − residual / total, the mean over the outputs; an output whose target never changes counts 0 unless exact."""
    count = weights.sum(1, keepdims=True)
    residual = weights @ squares
    centred = targets - targets.mean(0)
    total = weights @ centred**2 - (weights @ centred) ** 2 / count
    scores = 1 - np.divide(residual, total, out=np.ones_like(residual), where=total > 1e-12 * count)
    means: Floats = np.where(residual == 0, 1.0, scores).mean(1)
    return means


def _macro(metric: str, kinds: Floats, weights: Floats, column: int) -> Floats:
    """Macro averages over the classes that a resample holds, one resample after the other."""
    classes, positions = np.unique(kinds, return_inverse=True)
    labels, predictions = positions.reshape(kinds.shape)[:, [0, column]].T
    right, size = labels == predictions, len(classes)

    def count(of: npt.NDArray[Any], weight: Floats) -> Floats:
        return np.bincount(of, weights=weight, minlength=size).astype(np.float64)

    at = ("precision", "recall", "f1").index(metric)
    return np.array(
        [macro(count(labels, one * right), count(predictions, one), count(labels, one))[at] for one in weights]
    )
