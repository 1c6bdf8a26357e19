"""Accuracy, precision, recall and F1 of a classifier, streamed: counts per class, so memory is O(classes).

Macro averages are over the classes that occur in labels or predictions, a quotient by zero is 0, as in scikit-learn.
Plain counting in numpy, not torchmetrics: its float32 quotients make 540 right of 600 0.8999999762, which fails a gate
of 0.9; its counts go through a matrix of classes², 8 GB at 32,768 classes; importing it costs 1.2 s and 110 MB (it
brings matplotlib and scipy), where most sets are classes. The tests hold these numbers against scikit-learn's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[Any]
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

    def predicted(self) -> list[int]:
        """The classes that were answered at all."""
        return [int(one) for one in np.flatnonzero(self._predicted)]

    def scores(self) -> Scores:
        """Raises ValueError before the first row."""
        count = int(self._actual.sum())
        if not count:
            raise ValueError("nothing was counted")
        size = max(self._predicted.size, self._actual.size)
        right, predicted, actual = (_padded(one, size) for one in (self._right, self._predicted, self._actual))
        seen = np.flatnonzero(predicted + actual)
        precision, recall, f1 = _by_class(right, predicted, actual)
        averages = macro(right, predicted, actual)
        return Scores(
            accuracy=float(right.sum() / count),
            precision=averages[0],
            recall=averages[1],
            f1=averages[2],
            count=count,
            classes={int(c): (float(precision[c]), float(recall[c]), float(f1[c]), int(actual[c])) for c in seen},
        )


def macro(right: Numbers, predicted: Numbers, actual: Numbers) -> tuple[float, float, float]:
    """Precision, recall and F1 of counts per class (or of weights), the mean over the classes that occur."""
    seen = predicted + actual > 0
    precision, recall, f1 = (float(scores[seen].mean()) for scores in _by_class(right, predicted, actual))
    return precision, recall, f1


def _by_class(right: Numbers, predicted: Numbers, actual: Numbers) -> tuple[Floats, Floats, Floats]:
    return _quotient(right, predicted), _quotient(right, actual), _quotient(2 * right, predicted + actual)


def _plus(counts: Counts, classes: Counts) -> Counts:
    size = max(counts.size, int(classes.max(initial=-1)) + 1)
    total: Counts = _padded(counts, size) + np.bincount(classes, minlength=size)
    return total


def _padded(counts: Counts, size: int) -> Counts:
    return np.pad(counts, (0, size - counts.size))


def _quotient(part: Numbers, whole: Numbers) -> Floats:
    return np.divide(part, whole, out=np.zeros(part.size), where=whole > 0)
