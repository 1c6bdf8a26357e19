"""What each task measures: a meter is fed batches of labels and outputs, in bounded memory.

The numbers of regression and language are torchmetrics', in float64. Those of classes are `workers.classification`'s,
which says why. `add` also gives each row's own terms, which torchmetrics does not: the paired bootstrap draws rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from weighbridge.engines import datatypes
from weighbridge.engines.errors import EngineError
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array, Arrays
from weighbridge.registry.recipe import MetricName, Task
from weighbridge.registry.schemas import Metric
from weighbridge.workers.classification import ClassCounts
from weighbridge.workers.evaluation.datasets import LABELS, BadDataset
from weighbridge.workers.evaluation.drift import Neighbours, log_probabilities, probabilities

METRICS: Mapping[Task, tuple[MetricName, ...]] = {
    "classification": ("accuracy", "precision", "recall", "f1"),
    "regression": ("mse", "mae", "r2"),
    "language": ("perplexity", "accuracy"),
    "embedding": ("cosine", "retrieval_agreement", "accuracy"),
}
"""What an artifact or, of an embedding's, a variant can be measured by; the first is the task's own."""
IGNORED = -100
"""The label of a token that does not count, as in torch's cross entropy."""
_SLICED = 100
"""Classes beyond this many get no metrics of their own."""
Terms = Mapping[str, Array]
"""Of a batch's rows, by metric: [rows], or [rows, terms]; `count` is what a row weighs in a mean."""


class Meter(Protocol):
    def add(self, labels: Array | None, output: Array) -> Terms:
        """Count a batch; only an embedding needs no labels. Raises BadDataset, EngineError (infinities)."""
        ...

    def scores(self) -> dict[str, float]:
        """The metrics over all rows."""
        ...

    def slices(self) -> list[Metric]:
        """Those of parts of the rows: each class."""
        ...

    def notes(self) -> list[str]:
        """What a person should know of the numbers."""
        ...


def meter(task: Task, output: TensorSpec, rows: int) -> Meter:
    """The meter of a task for `rows` rows of outputs of this spec."""
    if task == "embedding":
        return Retrieval(output, rows)
    kinds: dict[Task, type[Classification | Regression | Language]] = {
        "classification": Classification,
        "regression": Regression,
        "language": Language,
    }
    return kinds[task](output)


def targets(task: Task, inputs: Arrays, labels: Array | None) -> Array | None:
    """The labels; of a language without any the next tokens of its one integer input. Raises BadDataset."""
    if labels is not None or task != "language":
        return labels
    tokens = [array for array in inputs.values() if array.ndim == 2 and array.dtype.kind in "iu"]
    if len(tokens) != 1:
        raise BadDataset(f"{LABELS} is missing, and {len(tokens)} inputs hold tokens; next tokens need exactly one")
    following = np.full(tokens[0].shape, IGNORED, np.int64)
    following[:, :-1] = tokens[0][:, 1:]
    return following


class NotANumber(EngineError):
    """An output holds NaN."""


def numbers(output: Array, name: str) -> Array:
    """An output as numpy computes with it; a single number is a vector of one. Raises NotANumber."""
    values: Array = np.atleast_1d(output if output.dtype.kind in "iub" else output.astype(np.float64))
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise NotANumber(f"{name} holds NaN")
    return values


class Classification:
    """Scores [rows, classes] are decided by their largest; a vector of integers is the decision itself."""

    def __init__(self, output: TensorSpec) -> None:
        self._output, self._counts = output, ClassCounts()

    def add(self, labels: Array | None, output: Array) -> Terms:
        assert labels is not None, "the dataset was checked"
        if len(output) != len(labels):
            raise BadDataset(f"output {self._output.name} is {_said(output)}: not one row for each of {len(labels)}")
        if output.ndim == 2:
            if (most := int(labels.max())) >= output.shape[1]:
                rule = f"output {self._output.name} has 0 to {output.shape[1] - 1}"
                raise BadDataset(f"{LABELS}: there is a class {most}, {rule}")
            predictions = output.argmax(axis=1)
        elif output.ndim == 1 and output.dtype.kind in "iu":
            predictions = output
        else:
            raise BadDataset(f"output {self._output.name} is {_said(output)}: no scores per class, no classes")
        try:
            self._counts.add(labels, predictions)
        except ValueError as wrong:
            raise BadDataset(f"{LABELS}: {wrong}") from wrong
        right = (labels == predictions).astype(np.float64)
        return {"accuracy": right, "classes": predictions.astype(np.float64), "count": np.ones(len(right))}

    def scores(self) -> dict[str, float]:
        scores = self._counts.scores()
        return {name: float(getattr(scores, name)) for name in METRICS["classification"]}

    def slices(self) -> list[Metric]:
        rows = []
        for label, (precision, recall, f1, support) in list(self._counts.scores().classes.items())[:_SLICED]:
            values = {"precision": precision, "recall": recall, "f1": f1, "support": float(support)}
            rows += [
                Metric(name=name, value=value, slice=f"class={label}", unit="rows" * (name == "support"))
                for name, value in values.items()
            ]
        return rows

    def notes(self) -> list[str]:
        answered = self._counts.predicted()
        if len(answered) > 1:
            return []
        return [f"every row is answered with class {answered[0]}: the model tells nothing apart"]


class Regression:
    """Numbers [rows, …] against labels of the same shape. r2 is the mean over the outputs; it needs two rows."""

    def __init__(self, output: TensorSpec) -> None:
        import torch
        from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

        self._output, self._rows = output, 0
        self._metrics = {"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": R2Score()}
        for metric in self._metrics.values():
            metric.set_dtype(torch.float64)

    def add(self, labels: Array | None, output: Array) -> Terms:
        assert labels is not None, "the dataset was checked"
        rows = len(labels)
        if _squeezed(output) != _squeezed(labels):
            raise BadDataset(f"output {self._output.name} is {_said(output)}, {LABELS} are {list(labels.shape)}")
        wanted, seen = (one.reshape(rows, -1).astype(np.float64) for one in (labels, output))
        if not (np.isfinite(seen).all() and np.isfinite(wanted).all()):
            raise EngineError(f"output {self._output.name} holds infinities or NaN")
        self._rows += rows
        flat = [datatypes.array_to_tensor(one[:, 0] if one.shape[1] == 1 else one) for one in (seen, wanted)]
        for metric in self._metrics.values():
            metric.update(*flat)
        squares = (seen - wanted) ** 2
        count = np.full(rows, float(wanted.shape[1]))
        return {
            "mse": squares.sum(1),
            "mae": np.abs(seen - wanted).sum(1),
            "r2": squares,
            "targets": wanted,
            "count": count,
        }

    def scores(self) -> dict[str, float]:
        names = ("mse", "mae", "r2") if self._rows > 1 else ("mse", "mae")
        return {name: float(self._metrics[name].compute()) for name in names}

    def slices(self) -> list[Metric]:
        return []

    def notes(self) -> list[str]:
        return []


class Language:
    """Logits [rows, tokens, vocabulary]; label [i, j] is the token that logits [i, j] should give, −100 where none."""

    def __init__(self, output: TensorSpec) -> None:
        import torch
        from torchmetrics.text import Perplexity

        self._output, self._right, self._count, self._read = output, 0.0, 0.0, False
        self._perplexity = Perplexity(ignore_index=IGNORED)
        self._perplexity.set_dtype(torch.float64)

    def add(self, labels: Array | None, output: Array) -> Terms:
        assert labels is not None, "the dataset was checked"
        import torch

        if output.ndim != 3 or output.dtype.kind != "f" or output.shape[:2] != labels.shape:
            raise BadDataset(f"output {self._output.name} is {_said(output)}, {LABELS} are {list(labels.shape)}")
        labels, counted = labels.astype(np.int64), labels != IGNORED
        known = labels[counted]
        if known.size and not (known.min() >= 0 and known.max() < output.shape[2]):
            rule = f"the program has 0 to {output.shape[2] - 1}"
            raise BadDataset(f"{LABELS}: tokens run from {known.min()} to {known.max()}, {rule}")
        if probabilities(output):
            output, self._read = log_probabilities(output), True
        logits, wanted = torch.from_numpy(output), torch.from_numpy(labels)
        self._perplexity.update(logits, wanted)
        flat = logits.flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(flat, wanted.flatten(), ignore_index=IGNORED, reduction="none")
        right = ((output.argmax(2) == labels) & counted).sum(1).astype(np.float64)
        count = counted.sum(1).astype(np.float64)
        self._right, self._count = self._right + right.sum(), self._count + count.sum()
        return {"perplexity": losses.view(labels.shape).sum(1).numpy(), "accuracy": right, "count": count}

    def scores(self) -> dict[str, float]:
        if not self._count:
            raise BadDataset(f"no token counts: all {LABELS} are {IGNORED}, or rows have one token")
        perplexity = float(self._perplexity.compute())
        if not np.isfinite(perplexity):
            raise EngineError(f"output {self._output.name} gives a token that counts no probability at all")
        return {"perplexity": perplexity, "accuracy": self._right / self._count}

    def slices(self) -> list[Metric]:
        return []

    def notes(self) -> list[str]:
        return [f"output {self._output.name} holds probabilities, and is read as such"] if self._read else []


class Retrieval:
    """Embeddings [rows, width]: with classes as labels, how often the nearest other row is of the same class."""

    def __init__(self, output: TensorSpec, rows: int) -> None:
        self._output, self._neighbours = output, Neighbours(rows)
        self._labels: list[Array] = []

    def add(self, labels: Array | None, output: Array) -> Terms:
        if output.ndim != 2 or output.dtype.kind != "f":
            raise BadDataset(f"output {self._output.name} is {_said(output)}: embeddings are floats [rows, width]")
        if labels is not None and len(labels) != len(output):
            raise BadDataset(f"output {self._output.name} is {_said(output)}: not one row for each of {len(labels)}")
        taken = self._neighbours.add(output)
        if labels is not None:
            self._labels.append(labels[taken])
        return {}

    def right(self) -> Array | None:
        """Of each sampled row, whether its nearest is of its class; None without labels or a second row."""
        nearest = self._neighbours.nearest()
        if not self._labels or not len(nearest):
            return None
        labels = np.concatenate(self._labels)
        same: Array = labels == labels[nearest]
        return same

    def scores(self) -> dict[str, float]:
        right = self.right()
        return {} if right is None else {"accuracy": float(right.mean())}

    def slices(self) -> list[Metric]:
        return []

    def notes(self) -> list[str]:
        return []


def _squeezed(array: Array) -> tuple[int, ...]:
    """The shape without lengths of 1 beyond the rows: [n, 1] is [n], and [n, 2, 3] is not [n, 3, 2]."""
    return array.shape[:1] + tuple(length for length in array.shape[1:] if length != 1)


def _said(output: Array) -> str:
    return f"{output.dtype}{list(output.shape)}"
