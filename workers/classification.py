"""Accuracy, precision, recall and F1 of a classifier, streamed: counts per class, so memory is O(classes).

Macro averages are over the classes that occur in labels or predictions, a quotient by zero is 0, as in scikit-learn.
Plain counting in numpy: the metric libraries bring scikit-learn or lightning along for these six lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
MAX_CLASSES = 1 << 20


@dataclass(frozen=True, slots=True)
class Scores:
    """Each in [0, 1]; `classes` holds {class: (precision, recall, f1, support)}."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    count: int
    classes: dict[int, tuple[float, float, float, int]]


class ClassCounts:
    """Right, predicted and actual counts per class, fed batch by batch."""

    def __init__(self) -> None:
        self._right, self._predicted, self._actual = (np.zeros(0, np.int64) for _ in range(3))

    def add(self, labels: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> None:
        """Two integer vectors of one length, all in [0, MAX_CLASSES). Raises ValueError."""
        labels, predictions = labels.astype(np.int64), predictions.astype(np.int64)
        both = np.concatenate([labels, predictions])
        if both.size and not (both.min() >= 0 and both.max() < MAX_CLASSES):
            raise ValueError(f"classes run from {both.min()} to {both.max()}, allowed are 0 to {MAX_CLASSES - 1}")
        self._right = _plus(self._right, labels[labels == predictions])
        self._predicted = _plus(self._predicted, predictions)
        self._actual = _plus(self._actual, labels)

    def scores(self) -> Scores:
        """Raises ValueError before the first row."""
        count = int(self._actual.sum())
        if not count:
            raise ValueError("nothing was counted")
        size = max(self._predicted.size, self._actual.size)
        right, predicted, actual = (_padded(one, size) for one in (self._right, self._predicted, self._actual))
        seen = np.flatnonzero(predicted + actual)
        precision, recall = _quotient(right, predicted), _quotient(right, actual)
        f1 = _quotient(2 * right, predicted + actual)
        return Scores(
            accuracy=float(right.sum() / count),
            precision=float(precision[seen].mean()),
            recall=float(recall[seen].mean()),
            f1=float(f1[seen].mean()),
            count=count,
            classes={int(c): (float(precision[c]), float(recall[c]), float(f1[c]), int(actual[c])) for c in seen},
        )


def _plus(counts: Counts, classes: Counts) -> Counts:
    size = max(counts.size, int(classes.max(initial=-1)) + 1)
    total: Counts = _padded(counts, size) + np.bincount(classes, minlength=size)
    return total


def _padded(counts: Counts, size: int) -> Counts:
    return np.pad(counts, (0, size - counts.size))


def _quotient(part: Counts, whole: Counts) -> npt.NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(part.size), where=whole > 0)
