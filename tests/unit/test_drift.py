"""Drift of outputs: by hand, against torchmetrics, and by the definition."""

from __future__ import annotations

import numpy as np
import pytest

from weighbridge.engines.errors import EngineError
from weighbridge.workers.evaluation import drift
from weighbridge.workers.evaluation.drift import Drift, Neighbours, divergence

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((50, 7))


def test_an_original_does_not_drift_from_itself() -> None:
    """Agreement and cosine exactly 1, divergence exactly 0; masked logits included."""
    masked = LOGITS.copy()
    masked[:, 0] = -np.inf
    seen = Drift("classification", 50)
    seen.add(masked, masked.copy())
    results = seen.results()
    assert (results["top1"], results["cosine_min"]) == (1, 1)
    assert (results["kl_mean"], results["kl_p99"], results["max_abs"]) == (0, 0, 0)


def test_divergence_is_that_of_the_softmax() -> None:
    """By hand for two classes, and as torchmetrics has it."""
    import torch
    from torchmetrics.functional import kl_divergence

    p, q = np.array([0.8, 0.2]), np.array([0.5, 0.5])
    by_hand = 0.8 * np.log(0.8 / 0.5) + 0.2 * np.log(0.2 / 0.5)
    assert divergence(np.log(p)[None], np.log(q)[None] + 3) == pytest.approx([by_hand])
    other = LOGITS + 0.1 * RNG.standard_normal(LOGITS.shape)
    theirs = kl_divergence(
        *(torch.log_softmax(torch.from_numpy(one), 1) for one in (LOGITS, other)), log_prob=True, reduction="none"
    )
    assert divergence(LOGITS, other) == pytest.approx(theirs.numpy())


def test_batches_add_up() -> None:
    """The same numbers whole and in parts; one changed answer of fifty is 98% agreement."""
    other = LOGITS + 1e-3
    other[7, LOGITS[7].argmin()] = 9
    whole, parts = Drift("classification", 50), Drift("classification", 50)
    whole.add(LOGITS, other)
    for start in range(0, 50, 20):
        parts.add(LOGITS[start : start + 20], other[start : start + 20])
    assert parts.results() == pytest.approx(whole.results())
    assert whole.results()["top1"] == 0.98
    assert whole.results()["max_abs"] == pytest.approx(9 - LOGITS[7].min())


def test_only_tokens_that_count_drift() -> None:
    """Padding may answer anything."""
    original = RNG.standard_normal((4, 5, 7))
    variant, counted = original.copy(), np.ones((4, 5), bool)
    variant[:, 3:], counted[:, 3:] = 100, False
    seen = Drift("language", 4)
    seen.add(original, variant, counted)
    assert (seen.rows, seen.results()["top1"], seen.results()["kl_mean"]) == (12, 1, 0)


def test_single_numbers_are_one_vector() -> None:
    """A regression of one output has one cosine; the largest difference is told also as a share of the largest."""
    original = np.arange(1.0, 5.0)
    seen = Drift("regression", 4)
    seen.add(original[:2], original[:2] + 0.5)
    seen.add(original[2:, None], original[2:, None])
    variant = np.array([1.5, 2.5, 3, 4])
    cosine = original @ variant / np.linalg.norm(original) / np.linalg.norm(variant)
    assert seen.results() == pytest.approx({"max_abs": 0.5, "max_relative": 0.125, "cosine": cosine})


def test_neighbours_are_the_nearest_others() -> None:
    """By brute force over the cosines, in several chunks; an embedding whose neighbours moved agrees less."""
    vectors = RNG.standard_normal((1100, 6))
    known = Neighbours(1100)
    for start in range(0, 1100, 300):
        known.add(vectors[start : start + 300])
    cosines = np.corrcoef(np.hstack([vectors, -vectors]))  # rows of mean 0: the correlation is the cosine
    np.fill_diagonal(cosines, -2)
    assert (known.nearest() == cosines.argmax(1)).mean() > 0.999
    seen = Drift("embedding", 1100)
    seen.add(vectors, vectors + 0.5 * RNG.standard_normal(vectors.shape))
    results = seen.results()
    assert 0 < results["retrieval_agreement"] < 0.2
    assert 0.8 < results["cosine"] < 0.95


def test_neighbours_are_looked_for_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more rows than the bound an even sample is taken, and its labels with it."""
    monkeypatch.setattr(drift, "NEIGHBOUR_ROWS", 10)
    known = Neighbours(95)
    taken = [known.add(RNG.standard_normal((19, 3))) for _ in range(5)]
    assert np.flatnonzero(np.concatenate(taken)).tolist() == list(range(0, 95, 10))
    assert len(known.nearest()) == 10


def test_other_shapes_are_refused() -> None:
    """Ten classes cannot be compared with nine."""
    with pytest.raises(EngineError, match=r"the variant's output is \[2, 9\], the original's \[2, 10\]"):
        Drift("classification", 2).add(np.zeros((2, 10)), np.zeros((2, 9)))
    with pytest.raises(EngineError, match=r"of a classification task it is \[rows, classes\]"):
        Drift("classification", 2).add(np.zeros((2, 3, 4, 4)), np.zeros((2, 3, 4, 4)))
