"""How far a variant's outputs are from the original's on the same inputs, whatever the labels say.

Rows are vectors: of classes, of a vocabulary for each token that counts, or embeddings. Divergences are kept one float
for each row, for the 99th percentile; everything else is sums.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from weighbridge.engines.errors import EngineError
from weighbridge.engines.protocols import Array
from weighbridge.registry.recipe import Task

Floats = npt.NDArray[np.float64]
UNITS = {"kl_mean": "nats", "kl_p99": "nats", "rows": "rows"}
NEIGHBOUR_ROWS = 4096
"""Rows among which nearest neighbours are looked for, evenly taken, and at most NEIGHBOUR_BYTES of float32."""
NEIGHBOUR_BYTES = 64 << 20
_CHUNK = 512
_SUMS, _LEAST = 0.02, 1e-30
_FINITE = 1e30
"""Stands for an infinite logit (a masked token): its probability is 0 all the same, and differences stay numbers."""


class Neighbours:
    """The nearest other row by cosine, among an even sample of `rows` vectors that are added in order."""

    def __init__(self, rows: int) -> None:
        self._rows, self._seen, self._stride = rows, 0, 0
        self._kept: list[npt.NDArray[np.float32]] = []

    def add(self, vectors: Floats) -> npt.NDArray[np.bool_]:
        """Count vectors [rows, width]; says which are of the sample."""
        if not self._stride:
            most = max(2, min(NEIGHBOUR_ROWS, NEIGHBOUR_BYTES // (4 * max(1, vectors.shape[1]))))
            self._stride = math.ceil(self._rows / most)
        taken: npt.NDArray[np.bool_] = (np.arange(len(vectors)) + self._seen) % self._stride == 0
        self._seen += len(vectors)
        lengths = np.linalg.norm(vectors[taken], axis=1, keepdims=True)
        self._kept.append((vectors[taken] / np.maximum(lengths, 1e-12)).astype(np.float32))
        return taken

    def nearest(self) -> npt.NDArray[np.int64]:
        """The index of each sampled row's nearest other row, the first where several are as near; empty for one row."""
        vectors = np.concatenate(self._kept)
        found = [np.zeros(0, np.int64)]
        for start in range(0, len(vectors) if len(vectors) > 1 else 0, _CHUNK):
            near = vectors[start : start + _CHUNK] @ vectors.T
            near[np.arange(len(near)), start + np.arange(len(near))] = -np.inf
            found.append(near.argmax(1))
        return np.concatenate(found)


class Drift:
    """Fed by batches of both outputs, [rows, …] each; `rows` is how many will come (for the sample of neighbours)."""

    def __init__(self, task: Task, rows: int) -> None:
        self._task, self.rows = task, 0
        self._same, self._kl, self._cosines = 0, [np.zeros(0, np.float32)], [np.zeros(0)]
        self._worst = self._largest = 0.0
        self._dots = np.zeros(3)
        """original·variant, original², variant², over everything."""
        self._width = 0
        self._neighbours = (Neighbours(rows), Neighbours(rows)) if task == "embedding" else None

    def add(self, original: Array, variant: Array, counted: Array | None = None) -> None:
        """Compare a batch; of a language only the tokens where `counted`. Raises EngineError where shapes differ."""
        if original.shape != variant.shape:
            raise EngineError(f"the variant's output is {list(variant.shape)}, the original's {list(original.shape)}")
        first, second = (_vectors(one, self._task, counted) for one in (original, variant))
        if not len(first):
            return
        self.rows, self._width = self.rows + len(first), first.shape[1]
        same = (first == second).all(1)
        self._worst = max(self._worst, float(np.abs(first - second).max()))
        self._largest = max(self._largest, float(np.abs(first).max()))
        self._dots += [(first * second).sum(), (first**2).sum(), (second**2).sum()]
        self._cosines.append(np.where(same, 1.0, _cosine(first, second)))
        if self._task in ("classification", "language"):
            self._compare_classes(first, second)
        if self._neighbours is not None:
            for known, vectors in zip(self._neighbours, (first, second), strict=True):
                known.add(vectors)

    def _compare_classes(self, first: Floats, second: Floats) -> None:
        if first.shape[1] == 1:  # decisions, not scores
            self._same += int((first == second).sum())
            return
        self._same += int((first.argmax(1) == second.argmax(1)).sum())
        self._kl.append(divergence(first, second).astype(np.float32))

    def cosines(self) -> Floats:
        """Of each row of the original's with the variant's."""
        return np.concatenate(self._cosines)

    def agreement(self) -> npt.NDArray[np.bool_]:
        """Of an embedding's sampled rows: whether the nearest other row is the same."""
        assert self._neighbours is not None
        return np.equal(*(known.nearest() for known in self._neighbours))

    def results(self) -> dict[str, float]:
        """top1, kl_mean, kl_p99 (classes, tokens); cosine, cosine_min; retrieval_agreement (embeddings); max_abs.

        max_relative (regression) is the largest difference over the largest output of the original's. Where rows are
        single numbers, all of them are one vector, and so have one cosine.
        """
        if not self.rows:
            return {}
        found = {"max_abs": self._worst}
        if self._task in ("classification", "language"):
            found["top1"] = self._same / self.rows
            divergences = np.concatenate(self._kl).astype(np.float64)
            if divergences.size:
                found |= {"kl_mean": float(divergences.mean()), "kl_p99": float(np.quantile(divergences, 0.99))}
        if self._task == "regression":
            found["max_relative"] = self._worst / self._largest if self._largest else float(self._worst > 0)
        cosines = self.cosines()
        if self._width == 1:
            found["cosine"] = self._of_all()
        else:
            found |= {"cosine": float(cosines.mean()), "cosine_min": float(cosines.min())}
        if self._neighbours is not None and len(agreed := self.agreement()):
            found["retrieval_agreement"] = float(agreed.mean())
        return found

    def _of_all(self) -> float:
        dot, first, second = self._dots
        if first == second == dot:
            return 1.0
        return float(dot / math.sqrt(first * second)) if first * second > 0 else 0.0


def divergence(original: Floats, variant: Floats) -> Floats:
    """Kullback-Leibler divergence of softmax(variant) from softmax(original), row by row, in nats.

    Outputs that are probabilities already are taken as they are.
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax

    if probabilities(original):
        original, variant = log_probabilities(original), log_probabilities(variant)
    said, expected = (log_softmax(torch.from_numpy(one), dim=1) for one in (variant, original))
    rows: Floats = kl_div(said, expected, reduction="none", log_target=True).sum(1).clamp_min(0).numpy()
    return rows


def probabilities(output: Array) -> bool:
    """Whether the last axis holds distributions: nothing below 0, and sums of 1 as half precision has them."""
    return bool(output.shape[-1] > 1 and (output >= 0).all() and (np.abs(output.sum(-1) - 1) <= _SUMS).all())


def log_probabilities(output: Array) -> Floats:
    """Logits whose softmax is the output."""
    logs: Floats = np.log(np.maximum(output, _LEAST))
    return logs


def _vectors(output: Array, task: Task, counted: Array | None) -> Floats:
    """[rows, width]; a language's rows are the tokens that count. Raises EngineError."""
    if (task == "language" and output.ndim != 3) or (task == "classification" and output.ndim > 2):
        wanted = "[rows, tokens, vocabulary]" if task == "language" else "[rows, classes]"
        raise EngineError(f"the output is {list(output.shape)}; of a {task} task it is {wanted}")
    if task == "language":
        output = output[counted] if counted is not None else output.reshape(-1, output.shape[2])
    rows = output.reshape(len(output), -1).astype(np.float64)
    clipped: Floats = np.clip(rows, -_FINITE, _FINITE)
    return clipped


def _cosine(first: Floats, second: Floats) -> Floats:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: Floats = np.divide((first * second).sum(1), lengths, out=np.zeros(len(first)), where=lengths > 0)
    return cosines
