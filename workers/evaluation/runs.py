"""Run one artifact or two over the same batches, in the memory that there is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from weighbridge.engines import tensors
from weighbridge.engines.protocols import Array, Arrays, Session
from weighbridge.workers.evaluation.datasets import BATCH_ROWS, Batch, Source
from weighbridge.workers.evaluation.tasks import numbers

Open = Callable[[], Session]
"""Loads an artifact; MemoryError or torch's OutOfMemoryError where it does not fit."""


class Runner:
    """Answers batches with the first output of a session; out of memory halves the rows that it runs at once."""

    def __init__(self, session: Session, whose: str = "") -> None:
        self.session, self._most = session, BATCH_ROWS
        self._name = f"{whose} output {session.outputs[0].name}".strip()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how it ran."""
        return (f"batch lowered to {self._most}: out of memory",) if self._most < BATCH_ROWS else ()

    def answer(self, inputs: Arrays, rows: int) -> Array:
        """The first output for `rows` rows, floats in float64. Raises EngineError (NaN, too few rows), MemoryError."""
        spec, start, parts = self.session.outputs[0], 0, []
        while start < rows:
            stop = min(rows, start + self._most)
            try:
                output = self.session.infer(tensors.rows(inputs, start, stop, self.session.inputs))[spec.name]
            except Exception as failed:
                if not out_of_memory(failed):
                    raise
                if stop - start == 1:
                    raise MemoryError(f"{self._name}: not even one row fits") from failed
                self._most = (stop - start) // 2
                continue
            parts.append(numbers(output, self._name, stop - start))
            start = stop
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def out_of_memory(failed: BaseException | None) -> bool:
    """Whether a failure, or what it came from, is that of memory; engines say both in their own words."""
    import torch

    while failed is not None:
        if isinstance(failed, MemoryError | torch.OutOfMemoryError):
            return True
        failed = failed.__cause__ or failed.__context__
    return False


def pairs(original: Open, variant: Open, source: Source, notes: list[str]) -> Iterator[tuple[Batch, Array, Array]]:
    """Every batch with both answers. Where both do not fit, one after the other, the original's answers on disk.

    How it ran is added to `notes`. Raises what loading and running raise.
    """
    one = Runner(original(), "the original's")
    try:
        try:
            other = Runner(variant(), "the variant's")
        except Exception as failed:
            if not out_of_memory(failed):
                raise
            notes.append("original and variant ran one after the other: memory for one only")
            yield from _spooled(one, variant, source, notes)
            return
        try:
            for batch in source.batches():
                answer = one.answer(batch[0], count(batch))
                source.learn(answer)
                yield batch, answer, other.answer(batch[0], count(batch))
        finally:
            other.session.close()
            notes += dict.fromkeys(one.notes + other.notes)
    finally:
        one.session.close()


def _spooled(one: Runner, variant: Open, source: Source, notes: list[str]) -> Iterator[tuple[Batch, Array, Array]]:
    with tempfile.TemporaryFile() as spool:
        for batch in source.batches():
            answer = one.answer(batch[0], count(batch))
            source.learn(answer)
            np.save(spool, answer, allow_pickle=False)
        one.session.close()
        spool.seek(0)
        other = Runner(variant(), "the variant's")
        try:
            for batch in source.batches():
                yield batch, _next(spool), other.answer(batch[0], count(batch))
        finally:
            other.session.close()
            notes += dict.fromkeys(one.notes + other.notes)


def _next(spool: IO[bytes]) -> Array:
    output: Array = np.load(spool, allow_pickle=False)
    return output


def count(batch: Batch) -> int:
    """Rows of a batch."""
    return len(next(iter(batch[0].values())))
