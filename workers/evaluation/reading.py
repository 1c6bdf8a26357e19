"""Which output a metric reads, and as what: the recipe says it, else a rule that docs/recipe.md writes down.

Nothing here guesses where two answers are possible: what is unclear is refused with what to write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array
from weighbridge.registry.recipe import Task
from weighbridge.workers.evaluation.datasets import LABELS, BadDataset, Batch, Source

_LOGITS = frozenset({"logit", "logits"})
SCORES = _LOGITS | frozenset({"score", "scores", "prob", "probs", "probability", "probabilities"})
_USUAL: Mapping[Task, frozenset[str]] = {
    "classification": SCORES,
    "language": SCORES,
    "embedding": frozenset({"embedding", "embeddings", "pooled", "pooler"}),
    "regression": frozenset(),
}
"""Words in the names of outputs that decide among several that fit."""
_SMALLEST = 1e-12


class Unclear(Exception):
    """The recipe names no output, or a wrong one; the message says what to write."""


@dataclass(frozen=True)
class Binary:
    """One column decides between the classes 0 and 1: 1 above the threshold."""

    threshold: float
    probabilities: bool

    def scores(self, column: Array) -> Array:
        """As two columns of logits, of which the second is the larger above the threshold."""
        values = column.reshape(len(column)).astype(np.float64)
        above = values - self.threshold
        if self.probabilities and 0 < self.threshold < 1:
            above = _log_odds(values) - _log_odds(np.array(self.threshold))
        return np.column_stack([np.zeros(len(above)), above])


@dataclass(frozen=True)
class Reading:
    """The output that a metric reads. `binary` where it has one column for two classes."""

    spec: TensorSpec
    task: Task
    binary: Binary | None = None

    def scores(self, answer: Array) -> Array:
        """The answer as the task's meter takes it."""
        if self.binary is not None:
            return self.binary.scores(answer)
        if self.task == "classification" and answer.dtype.kind in "iub":
            decided = answer.reshape(-1) if answer.shape[1:] == (1,) else answer
            return decided.astype(np.int64)
        return answer

    @property
    def notes(self) -> tuple[str, ...]:
        if self.binary is None:
            return ()
        of = "probabilities" if self.binary.probabilities else "logits"
        return (f"output {self.spec.name} is read as {of}: class 1 above {self.binary.threshold:g}",)


def find(
    task: Task,
    outputs: Sequence[TensorSpec],
    source: Source,
    answer: Callable[[Batch], Mapping[str, Array]],
    *,
    named: str | None = None,
    threshold: float | None = None,
) -> Reading:
    """Choose the output, check the set's classes against it, and decide how one column is read.

    One column is of logits where its name says so, or one answer lies outside 0 to 1 (`answer` is asked until then).
    Raises Unclear, BadDataset, and what `answer` raises.
    """
    spec = choose(task, outputs, source, named)
    one = task == "classification" and _one_column(spec)
    if threshold is not None and not one:
        raise Unclear(f"threshold: output {spec.name} is {_said(spec)}, not one number a row: remove the threshold")
    check_classes(task, spec, source.classes)
    if not one:
        return Reading(spec, task)
    probabilities = not words(spec.name) & _LOGITS and all(
        ((column >= 0) & (column <= 1)).all() for column in (answer(batch)[spec.name] for batch in source.batches())
    )
    usual = 0.5 if probabilities else 0.0
    return Reading(spec, task, Binary(usual if threshold is None else threshold, probabilities))


def choose(task: Task, outputs: Sequence[TensorSpec], source: Source | None, named: str | None) -> TensorSpec:
    """The one that is named; the only one; the only one that fits the task and the labels; of several that fit the only
    one with a usual name. Raises Unclear. `source` None: nothing is known of labels."""
    listed = ", ".join(spec.name for spec in outputs)
    if named is not None:
        found = [spec for spec in outputs if spec.name == named]
        if not found:
            raise Unclear(f"output: {named} is none of the program's outputs ({listed})")
        return found[0]
    fitting = [spec for spec in outputs if _fits(task, spec, source)]
    usual = [spec for spec in fitting if words(spec.name) & _USUAL[task]]
    for candidates in (outputs, fitting, usual):
        if len(candidates) == 1:
            return candidates[0]
    example = (usual or fitting or outputs)[0].name
    raise Unclear(f"the program has the outputs {listed}: say which one {task} reads, e.g. output: {example}")


def check_classes(task: Task, spec: TensorSpec, found: tuple[int, int] | None) -> None:
    """Whether labels between these two can be classes of that output. Raises BadDataset with what to do."""
    if found is None or task not in ("classification", "embedding"):
        return
    least, most = found
    run = f"{LABELS}: classes run from {least} to {most}"
    if task == "classification" and least < 0:
        more = ": write 0 and 1" if found == (-1, 1) else ": a class is 0 or more; leave out rows that do not count"
        raise BadDataset(run + more)
    count = _classes(spec)
    if task == "classification" and count is not None and most >= count:
        more = "; they seem to count from 1: subtract 1" if (least, most) == (1, count) else ""
        raise BadDataset(f"{run}, output {spec.name} has 0 to {count - 1}{more}")
    if least == most:
        raise BadDataset(
            f"{LABELS} are all of the class {least}: every model that always answers it is right; add other classes"
        )


def words(name: str) -> set[str]:
    """`Class-logits_2` → class, logits, 2."""
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _fits(task: Task, spec: TensorSpec, source: Source | None) -> bool:
    rank, floating = len(spec.shape), spec.datatype.startswith(("FP", "BF"))
    if task == "language":
        return rank == 3 and floating
    if task == "embedding":
        return rank == 2 and floating
    if task == "regression":
        wanted = source.label_shape if source is not None else None
        return floating and (wanted is None or _squeezed(spec.shape[1:]) == _squeezed(wanted[1:]))
    count = _classes(spec)
    classes = source.classes if source is not None else None
    enough = count is None or classes is None or classes[1] < count
    return enough and (rank in (1, 2) if floating else _one_column(spec, floating=False))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)


def _one_column(spec: TensorSpec, *, floating: bool = True) -> bool:
    return spec.datatype.startswith(("FP", "BF")) == floating and (len(spec.shape) == 1 or spec.shape[1:] == (1,))


def _classes(spec: TensorSpec) -> int | None:
    """How many an output of scores knows; None where the contract does not say."""
    if _one_column(spec):
        return 2
    known = len(spec.shape) == 2 and spec.shape[1] > 1
    return spec.shape[1] if known else None


def _log_odds(values: Array) -> Array:
    inside = np.clip(values, _SMALLEST, 1 - _SMALLEST)
    odds: Array = np.log(inside) - np.log1p(-inside)
    return odds


def _said(spec: TensorSpec) -> str:
    return f"{spec.datatype}{list(spec.shape)}"
