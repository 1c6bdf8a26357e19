"""Every stage that works on a checkpoint's bytes, as a function of its task and a desk; and how to do it right here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

from weighbridge.workers.compress import CompressTask, assemble, compress
from weighbridge.workers.desk import Desk, Phase
from weighbridge.workers.evaluate import CompareTask, EvaluateTask, compare, evaluate
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.validate import ValidateTask, weigh


@dataclass(frozen=True)
class AssembleTask:
    """A compression in shards, and what each of them left."""

    whole: CompressTask
    parts: Sequence[Mapping[str, Any]]


def _evaluate(task: EvaluateTask, desk: Desk) -> Outcome:
    desk.enter(Phase.RUNNING)
    return evaluate(task, cache=desk.path, progress=desk.progress)


def _compare(task: CompareTask, desk: Desk) -> Outcome:
    desk.enter(Phase.RUNNING)
    return compare(task, cache=desk.path, progress=desk.progress)


def _compress(task: CompressTask, desk: Desk) -> Outcome:
    desk.enter(Phase.RUNNING)
    return compress(task, blobs=desk, cache=desk.path, scratch=desk.scratch, progress=desk.progress)


def _assemble(task: AssembleTask, desk: Desk) -> Outcome:
    desk.enter(Phase.RUNNING)
    return assemble(task.whole, task.parts, blobs=desk, cache=desk.path, scratch=desk.scratch, progress=desk.progress)


WORK: Mapping[type, Callable[[Any, Desk], Outcome]] = MappingProxyType(
    {
        ValidateTask: weigh,
        EvaluateTask: _evaluate,
        CompareTask: _compare,
        CompressTask: _compress,
        AssembleTask: _assemble,
    }
)
"""By the task's type."""


def perform(task: object, desk: Desk) -> Outcome:
    """Run the stage that the task is of, here and now."""
    return WORK[type(task)](task, desk)


class Performer(Protocol):
    """Where a stage runs: in a confined child (workers.confined.confine), or right here."""

    def perform(
        self,
        task: object,
        desk: Desk,
        beat: Callable[[], None],
        niceness: int = 0,
        seconds: float | None = None,
    ) -> Outcome:
        """Run it; `beat` is called now and then, and what it raises ends the stage. `seconds`: its time, or TooLong."""
        ...


class Here:
    """In this process, without a limit: for stories, tests and commands, whose checkpoints nobody else has written."""

    def perform(
        self,
        task: object,
        desk: Desk,
        beat: Callable[[], None],
        niceness: int = 0,
        seconds: float | None = None,
    ) -> Outcome:
        if not niceness:
            return perform(task, desk)
        # In a thread of its own: on Linux niceness is a thread's, and there is no way back up.
        with ThreadPoolExecutor(1, "nice", partial(os.setpriority, os.PRIO_PROCESS, 0, _at_least(niceness))) as pool:
            return pool.submit(perform, task, desk).result()


def _at_least(niceness: int) -> int:
    return max(niceness, os.getpriority(os.PRIO_PROCESS, 0))
