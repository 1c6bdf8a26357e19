"""Our counting equals scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge.workers.classification import ClassCounts

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.integers(1, 60))
def test_scores_equal_the_reference(pairs: list[tuple[int, int]], cut: int) -> None:
    """Accuracy and macro precision, recall, F1, fed in two batches."""
    metrics = pytest.importorskip("sklearn.metrics")
    labels, predictions = (np.array(one) for one in zip(*pairs, strict=True))
    counts = ClassCounts()
    counts.add(labels[:cut], predictions[:cut])
    counts.add(labels[cut:], predictions[cut:])
    seen = counts.scores()
    expected = metrics.precision_recall_fscore_support(labels, predictions, average="macro", zero_division=0)
    assert (seen.precision, seen.recall, seen.f1) == pytest.approx(expected[:3])
    assert seen.accuracy == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert sum(support for *_, support in seen.classes.values()) == len(pairs)


def test_a_class_out_of_range_is_refused() -> None:
    """A label of 2^40 must not become 8 TB of counters."""
    with pytest.raises(ValueError, match="classes run from"):
        ClassCounts().add(np.array([1 << 40]), np.array([0]))
    with pytest.raises(ValueError, match="nothing was counted"):
        ClassCounts().scores()
