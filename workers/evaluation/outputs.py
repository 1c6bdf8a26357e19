"""How far an output that no metric reads is from the original's: all that is served is judged.

By what it is: `classes` (scores or logits, by its name) are judged by their divergence, `names` (whole numbers) by how
many stay the same, all else (`numbers`) by its relative error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from weighbridge.engines.errors import EngineError
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array
from weighbridge.workers.evaluation.drift import Floats, divergence
from weighbridge.workers.evaluation.reading import SCORES, words

Kind = Literal["classes", "names", "numbers"]
DEFAULTS: Mapping[Kind, Mapping[str, float]] = {
    "classes": {"max_kl_mean": 0.02},
    "names": {"min_top1": 0.98},
    "numbers": {"max_error": 0.1},
}
"""Bounds where the recipe gives none. An error of 0.1 is a tenth of what the output varies by; a mean divergence of
0.02 nats is 2% of perplexity. Measured on an MLP of random weights: bf16 0.007, int8 forms 0.01 to 0.02, fp8 0.07, int4
0.16."""
LARGEST = 1e6
"""Stands for an error without bound, which JSON cannot say."""
_USUAL = 1e-3
"""A column that varies by less than this share of what is usual in its output is judged as if it varied by that; one
that holds zeros, as a ReLU makes them, as if it varied as is usual."""


def kind(spec: TensorSpec) -> Kind:
    if not spec.datatype.startswith(("FP", "BF")):
        return "names"
    scores = len(spec.shape) > 1 and spec.shape[-1] != 1 and words(spec.name) & SCORES
    return "classes" if scores else "numbers"


class OutputDrift:
    """Fed by batches of one output of both, [rows, …]; its columns are the last axis."""

    def __init__(self, spec: TensorSpec) -> None:
        self.kind = kind(spec)
        self._name = spec.name
        self._count = self._same = 0
        self._worst, self._marks = 0.0, False
        self._divergences = [np.zeros(0)]
        self._dots = np.zeros(3)
        self._shift: Floats | None = None
        self._sums = np.zeros((5, 0))
        """By column: elements, sum and squares of the original's less the shift, squares of the difference, zeros."""

    def add(self, original: Array, variant: Array) -> None:
        """Compare a batch. Raises EngineError where shapes differ."""
        if original.shape != variant.shape:
            shapes = f"{list(variant.shape)}, the original's {list(original.shape)}"
            raise EngineError(f"the variant's output {self._name} is {shapes}")
        if not original.size:
            return
        if self.kind == "names":
            self._count, self._same = self._count + original.size, self._same + int((original == variant).sum())
            return
        first, second = (_columns(one) for one in (original, variant))
        if self.kind == "classes":
            self._count += len(first)
            self._same += int((first.argmax(1) == second.argmax(1)).sum())
            self._divergences.append(divergence(first, second))
        self._add_numbers(first, second)

    def _add_numbers(self, first: Floats, second: Floats) -> None:
        plain = np.isfinite(first)
        self._marks |= bool((first[~plain] != second[~plain]).any() or not np.isfinite(second[plain]).all())
        first, second = np.where(plain, first, 0), np.where(plain & np.isfinite(second), second, 0)
        if self._shift is None:
            self._shift, self._sums = first[0].copy(), np.zeros((5, first.shape[1]))
        difference, moved = second - first, np.where(plain, first - self._shift, 0)
        self._worst = max(self._worst, float(np.abs(difference).max()))
        zeros = (plain & (first == 0)).sum(0)
        self._sums += [plain.sum(0), moved.sum(0), (moved**2).sum(0), (difference**2).sum(0), zeros]
        self._dots += [(first * second).sum(), (first**2).sum(), (second**2).sum()]

    def results(self) -> dict[str, float]:
        """top1 (classes, names), kl_mean (classes); error, cosine, max_abs (all but names).

        `error` is the root mean square over the columns of each one's difference over its deviation.
        """
        found: dict[str, float] = {}
        if self._count:
            found["top1"] = self._same / self._count
        if (divergences := np.concatenate(self._divergences)).size:
            found["kl_mean"] = float(divergences.mean())
        if self._shift is not None:
            found |= {"error": self._error(), "cosine": self._cosine(), "max_abs": self._worst}
        return found

    def _error(self) -> float:
        if self._marks:
            return LARGEST
        count, total, squares, differences, zeros = self._sums
        some = np.maximum(count, 1)
        varies = np.sqrt(np.maximum(squares / some - (total / some) ** 2, 0))
        off = np.sqrt(differences / some)
        usual = float(np.exp(np.log(varies[varies > 0]).mean())) if varies.any() else self._size()
        least = np.where((zeros > 0) | (not varies.any()), usual, _USUAL * usual)
        scales = np.maximum(varies, least)
        errors = np.divide(off, scales, out=np.where(off > 0, LARGEST, 0.0), where=scales > 0)
        return float(min(np.sqrt((errors**2).mean()), LARGEST))

    def _size(self) -> float:
        """Of outputs that never vary."""
        return float(np.sqrt(self._dots[1] / max(self._sums[0].sum(), 1)))

    def _cosine(self) -> float:
        dot, first, second = self._dots
        if first == second == dot:
            return 1.0
        return float(dot / np.sqrt(first * second)) if first * second > 0 else 0.0


def _columns(output: Array) -> Floats:
    wide = output.astype(np.float64)
    return wide.reshape(-1, wide.shape[-1]) if wide.ndim > 1 else wide.reshape(-1, 1)
