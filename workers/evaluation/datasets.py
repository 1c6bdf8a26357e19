"""`eval.safetensors`: inputs by name and `labels`, read batch by batch from the mapped file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array, Arrays
from weighbridge.registry.recipe import Task
from weighbridge.storage.safetensors_header import MalformedHeader, ShortFile, header_length, parse_header

LABELS = "labels"
BATCH_BYTES = 16 << 20
"""Bytes of inputs in one batch (8 an element at most), and at most BATCH_ROWS rows."""
OUTPUT_BYTES = 64 << 20
"""Bytes of outputs in one batch, 8 an element: a language model gives a vocabulary for each token.

How many a row has is learned from the first, which is a batch of its own: free dimensions are not in the manifest.
"""
BATCH_ROWS = 256
_INTEGERS = ("U8", "I8", "I16", "U16", "I32", "U32", "I64")
_CLASSES: tuple[Task, ...] = ("classification", "embedding")
_PART = 1 << 20
_FLOATS = ("F16", "BF16", "F32", "F64")
Batch = tuple[Arrays, Array | None]
"""Inputs by name, and the labels where there are any; one row for each in every array."""


class BadDataset(Exception):
    """The evaluation set breaks a rule; the message names the tensor and the rule."""


class Source(Protocol):
    """Rows to run: `rows` counts them, `batches` gives them in the same order each time, once `learn` was called."""

    rows: int
    classes: tuple[int, int] | None
    """The least and the largest label, where labels are classes."""
    label_shape: tuple[int, ...] | None

    def batches(self) -> Iterator[Batch]: ...

    def learn(self, *outputs: Array) -> None:
        """Be told the first batch's outputs."""
        ...


class Dataset:
    """An open evaluation set that fits the program's inputs and the task. `rows` counts them."""

    def __init__(self, file: Any, inputs: Sequence[TensorSpec], task: Task) -> None:
        self.labelled = LABELS in file.keys()  # noqa: SIM118
        self.rows = _check_tensors(file, inputs, task)
        self._file, self._inputs = file, tuple(inputs)
        self._step: int | None = None
        self._most = _most(file, inputs, self.rows)
        self.label_shape = tuple(file.get_slice(LABELS).get_shape()) if self.labelled else None
        self.classes = _range(file.get_slice(LABELS)) if self.labelled and task in _CLASSES else None

    def batches(self) -> Iterator[Batch]:
        """Every row once, in order: the first, then as many at once as memory is meant for.

        Raises BadDataset where an input holds NaN, or a number among the labels is none.
        """
        slices = {spec.name: self._file.get_slice(spec.name) for spec in self._inputs}
        labels = self._file.get_slice(LABELS) if self.labelled else None
        start = stop = 0
        while stop < self.rows:
            start, stop = stop, min(self.rows, stop + (self._step or self._most) if stop else 1)
            part = slice(start, stop)
            inputs = {name: one[part] for name, one in slices.items()}
            for name, one in inputs.items():
                _refuse(np.isnan, name, one, start, "NaN")
            wanted = None if labels is None else labels[part]
            if wanted is not None:
                _refuse(lambda values: ~np.isfinite(values), LABELS, wanted, start, "NaN or infinity")
            yield inputs, wanted

    def learn(self, *outputs: Array) -> None:
        if self._step is None:
            elements = sum(one.size // max(1, len(one)) for one in outputs)
            self._step = max(1, min(self._most, OUTPUT_BYTES // max(1, 8 * elements)))


@contextmanager
def open_dataset(path: Path, inputs: Sequence[TensorSpec], task: Task) -> Iterator[Dataset]:
    """Open a set for a program. Raises BadDataset."""
    _check_header(path)
    with safe_open(path, "np") as file:
        yield Dataset(file, inputs, task)


def _check_header(path: Path) -> None:
    """The library accepts duplicate keys and headers of any size; we do not."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = header_length(file.read(64 << 10), "the file", size)
            file.seek(8)
            header = parse_header(file.read(length), "the file")
        if size != header.expected_size:
            raise BadDataset(f"the file has {size:,} bytes, {header.expected_size:,} by its header")
    except (MalformedHeader, ShortFile) as wrong:
        raise BadDataset(str(wrong)) from wrong


def _check_tensors(file: Any, specs: Sequence[TensorSpec], task: Task) -> int:
    """The number of rows. Raises BadDataset."""
    names, needed = set(file.keys()), {spec.name for spec in specs}
    if task in ("classification", "regression"):
        needed.add(LABELS)
    if missing := sorted(needed - names):
        raise BadDataset(f"{missing[0]} is missing; it needs {', '.join(sorted(needed))}")
    try:
        if LABELS in names:
            _check_labels(file.get_slice(LABELS), task)
        of = LABELS if LABELS in names else specs[0].name
        count = int((file.get_slice(of).get_shape() or [0])[0])
        for spec in specs:
            shape = file.get_slice(spec.name).get_shape()
            if 0 in shape[1:]:  # any number of rows would be no bytes, and as many batches
                raise BadDataset(f"{spec.name} has the shape {shape}: its rows are empty")
            if shape[:1] != [count] or spec.shape[:1] != (-1,):
                raise BadDataset(f"{spec.name} has the shape {shape}; the rule is one row for each of {count} {of}")
    except SafetensorError as wrong:
        raise BadDataset(str(wrong)) from wrong
    if not count:
        raise BadDataset("it has no rows")
    return count


def _refuse(bad: Callable[[Array], Array], name: str, values: Array, start: int, what: str) -> None:
    """Raise BadDataset where a floating tensor holds what it must not, with the row."""
    if values.dtype.kind not in "fV":
        return
    wrong = bad(values).reshape(len(values), -1).any(1)
    if wrong.any():
        row = start + int(wrong.argmax())
        raise BadDataset(f"{name} holds {what} in row {row} (from 0): mend the row or leave it out")


def _range(labels: Any) -> tuple[int, int]:
    """The least and the largest of a vector of integers, read in parts."""
    (count,) = labels.get_shape()
    parts = [labels[start : min(count, start + _PART)] for start in range(0, count, _PART)]
    return min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)


def _check_labels(labels: Any, task: Task) -> None:
    """Classes are a vector of integers, tokens a matrix, the targets of a regression floats."""
    shape, dtype = labels.get_shape(), labels.get_dtype()
    fits, rule = {
        "classification": (len(shape) == 1 and dtype in _INTEGERS, "a vector of integers"),
        "embedding": (len(shape) == 1 and dtype in _INTEGERS, "a vector of integers"),
        "language": (len(shape) == 2 and dtype in _INTEGERS, "integers [rows, tokens], -100 where nothing counts"),
        "regression": (len(shape) >= 1 and dtype in _FLOATS, "floats, one row for each input"),
    }[task]
    if not fits:
        raise BadDataset(f"{LABELS} must be {rule}, not {dtype}{shape}{_advice(task, shape, dtype)}")


def _advice(task: Task, shape: list[int], dtype: str) -> str:
    """What to write instead."""
    if task == "regression":
        return ": write them as F32, or choose task: classification" if dtype in _INTEGERS else ""
    if dtype not in _INTEGERS:
        return ": write each row's class as an integer, I64" if task != "language" else ": write tokens as I64"
    if task == "language":
        return ": one label for each token, or choose task: classification"
    if shape[1:] == [1]:
        return f": write them as a vector of {shape[0]}"
    return (
        ": of one-hot labels write each row's class (their argmax); labels of tokens are for task: language; "
        "several classes a row have no metric here, but task: regression measures them as F32"
    )


def _most(file: Any, inputs: Sequence[TensorSpec], count: int) -> int:
    elements = sum(int(np.prod(file.get_slice(spec.name).get_shape()[1:], dtype=np.int64)) for spec in inputs)
    return max(1, min(BATCH_ROWS, count, BATCH_BYTES // max(1, 8 * elements)))
