"""Run one artifact or two over the same batches, in the memory that there is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO

import numpy as np

from weighbridge.engines import tensors
from weighbridge.engines.protocols import Array, Arrays, Session
from weighbridge.workers import ours
from weighbridge.workers.evaluation.datasets import BATCH_ROWS, BadDataset, Batch, Source
from weighbridge.workers.evaluation.tasks import NotANumber, numbers

Open = Callable[[], Session]
"""Loads an artifact; MemoryError or torch's OutOfMemoryError where it does not fit."""


Answers = Mapping[str, Array]
"""Every output by name."""


class Runner:
    """Answers batches with every output of a session; out of memory halves the rows that it runs at once."""

    def __init__(self, session: Session, whose: str = "") -> None:
        self.session, self._most = session, BATCH_ROWS
        self._names = {spec.name: f"{whose} output {spec.name}".strip() for spec in session.outputs}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how it ran."""
        return (f"batch lowered to {self._most}: out of memory",) if self._most < BATCH_ROWS else ()

    def answer(self, inputs: Arrays, rows: int) -> Answers:
        """Every output for `rows` rows, floats in float64.

        Raises EngineError (NaN), BadDataset (NaN where inputs are infinite), MemoryError.
        """
        start, parts = 0, []
        while start < rows:
            stop = min(rows, start + self._most)
            part = tensors.rows(inputs, start, stop, self.session.inputs)
            try:
                outputs = self.session.infer(part)
            except Exception as failed:
                if not out_of_memory(failed):
                    raise
                if stop - start == 1:
                    raise MemoryError(f"{next(iter(self._names.values()))}: not even one row fits") from failed
                self._most = (stop - start) // 2
                continue
            parts.append(self._numbers(part, outputs))
            start = stop
        return {name: _joined([part[name] for part in parts]) for name in self._names}

    def batch(self, batch: Batch) -> Answers:
        """Every output for a batch of a set. Raises as `answer`."""
        return self.answer(batch[0], count(batch))

    def _numbers(self, inputs: Arrays, outputs: Arrays) -> Answers:
        try:
            return {name: numbers(outputs[name], said) for name, said in self._names.items()}
        except NotANumber as wrong:
            infinite = [name for name, one in inputs.items() if one.dtype.kind in "fV" and np.isinf(one).any()]
            if infinite:
                raise BadDataset(f"{infinite[0]} holds infinities, and the answer to them is NaN") from wrong
            raise


def _joined(parts: list[Array]) -> Array:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


def out_of_memory(failed: BaseException | None) -> bool:
    """Whether a failure, or what it came from, is that of memory; engines say both in their own words."""
    return failed is not None and any(map(ours.out_of_memory, ours.chain(failed)))


def pairs(original: Open, variant: Open, source: Source, notes: list[str]) -> Iterator[tuple[Batch, Answers, Answers]]:
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
                answer = one.batch(batch)
                source.learn(*answer.values())
                yield batch, answer, other.batch(batch)
        finally:
            other.session.close()
            notes += dict.fromkeys(one.notes + other.notes)
    finally:
        one.session.close()


def _spooled(one: Runner, variant: Open, source: Source, notes: list[str]) -> Iterator[tuple[Batch, Answers, Answers]]:
    with tempfile.TemporaryFile() as spool:
        for batch in source.batches():
            answer = one.batch(batch)
            source.learn(*answer.values())
            for output in answer.values():
                np.save(spool, output, allow_pickle=False)
        one.session.close()
        spool.seek(0)
        other = Runner(variant(), "the variant's")
        try:
            for batch in source.batches():
                first = {spec.name: _next(spool) for spec in other.session.outputs}
                yield batch, first, other.batch(batch)
        finally:
            other.session.close()
            notes += dict.fromkeys(one.notes + other.notes)


def _next(spool: IO[bytes]) -> Array:
    output: Array = np.load(spool, allow_pickle=False)
    return output


def count(batch: Batch) -> int:
    """Rows of a batch."""
    return len(next(iter(batch[0].values())))
