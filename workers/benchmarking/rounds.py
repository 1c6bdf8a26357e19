"""Rounds: short blocks of each measured process in turn, forwards and backwards, only one running at a time.

A round is `A B C C B A`: A the original, B the candidate, C the original again. So every pair is an ABBA, a linear
drift of the machine cancels out of each ratio, and the A/A ratios come from the same moments as those they judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weighbridge.workers.benchmarking.children import Child
from weighbridge.workers.benchmarking.contention import Reading, Usage, Watch, disturbed
from weighbridge.workers.benchmarking.gpu import Gpu
from weighbridge.workers.benchmarking.machine import Alone

LEAST = 5
"""Rounds that count, at least: fewer give no interval."""
BLOCK_SECONDS = 0.02
"""Long beside a scheduler's slice of 4 ms, short beside what makes a machine drift."""
BLOCK_REQUESTS = 3
LOOK_SECONDS = 0.2
"""About as long as a round, so that the same limits hold."""


class Noisy(Exception):
    """The machine was too busy to measure on; the message says by what."""


@dataclass
class Seen:
    """What the rounds that counted gave: by process latencies, rows a second per round, p50 per round; seconds."""

    latencies: dict[str, list[float]] = field(default_factory=dict)
    throughputs: dict[str, list[float]] = field(default_factory=dict)
    medians: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.medians.values()), []))

    def faster(self, name: str, base: str) -> list[float]:
        """Per round, `base`'s p50 over `name`'s."""
        return [there / here for here, there in zip(self.medians[name], self.medians[base], strict=True)]

    def more(self, name: str, base: str) -> list[float]:
        """Per round, `name`'s throughput over `base`'s."""
        return [here / there for here, there in zip(self.throughputs[name], self.throughputs[base], strict=True)]

    def add(self, name: str, blocks: Sequence[Mapping[str, Any]], batch: int) -> None:
        latencies = [one for block in blocks for one in block["latencies"]]
        self.latencies.setdefault(name, []).extend(latencies)
        self.medians.setdefault(name, []).append(float(np.median(latencies)))
        rate = batch * len(latencies) / sum(block["seconds"] for block in blocks)
        self.throughputs.setdefault(name, []).append(rate)


class Course:
    """Runs blocks on the children, watches the machine meanwhile, and gives way to ordinary jobs between blocks."""

    def __init__(
        self,
        children: Mapping[str, Child],
        watch: Watch,
        lease: Alone | None,
        gpu: Gpu | None,
        beat: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.children, self.limits = children, watch.limits
        self.readings: list[Reading] = []
        self.reasons: list[str] = []
        """Why rounds did not count."""
        self.gave_way = 0
        self._watch, self._lease, self._gpu, self._beat, self._clock = watch, lease, gpu, beat, clock

    def rounds(
        self, names: Sequence[str], *, batch: int, seconds: float, callers: int = 1, requests: int = BLOCK_REQUESTS
    ) -> Seen:
        """As many rounds as fit, LEAST at least, of blocks of `requests` or more. Raises Noisy, ChildFailed."""
        seen, spoilt, start = Seen(), 0, self._clock()
        while seen.rounds < LEAST or self._clock() - start < seconds:
            self._beat()
            blocks, why = self._round(names, batch, callers, requests)
            if not why:
                for name in names:
                    seen.add(name, blocks[name], batch)
                continue
            spoilt += 1
            self.reasons.append(why)
            if spoilt > self.limits.disturbed * max(seen.rounds + spoilt, 2 * LEAST):
                raise Noisy(why)
        return seen

    def once(self, name: str, do: str, **order: Any) -> dict[str, Any]:
        """One order that is measured by itself, repeated while the machine is busy. Raises Noisy, ChildFailed."""
        why = ""
        for _ in range(LEAST):
            self._give_way()
            self._watch.start()
            answer = self.children[name].ask(do, **order)
            why = self._judge([answer])
            if not why:
                return answer
            self.reasons.append(why)
        raise Noisy(why)

    def await_quiet(self, most: float) -> None:
        """Let a disturbance pass: look at the machine while nothing of ours runs, for so many seconds at most."""
        for _ in range(int(most / LOOK_SECONDS)):
            self._beat()
            self._give_way()
            self._watch.start()
            time.sleep(LOOK_SECONDS)
            if not disturbed(self._watch.stop(Usage(), self._gpu, len(self.children)), self.limits):
                return

    def _round(
        self, names: Sequence[str], batch: int, callers: int, requests: int
    ) -> tuple[dict[str, list[dict[str, Any]]], str]:
        """The blocks by name, and why they do not count. What an ordinary job interrupted starts again, once: so
        neither waits for the other without end."""
        for patient in (False, True):
            self._give_way()
            self._watch.start()
            blocks = self._blocks(names, batch, callers, requests, patient)
            if blocks is not None:
                return blocks, self._judge([block for each in blocks.values() for block in each])
        raise AssertionError("a patient round ends")

    def _blocks(
        self, names: Sequence[str], batch: int, callers: int, requests: int, patient: bool
    ) -> dict[str, list[dict[str, Any]]] | None:
        blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for name in (*names, *reversed(names)):
            if not patient and self._wanted():
                return None
            order = {"batch": batch, "seconds": BLOCK_SECONDS, "least": requests, "callers": callers}
            blocks[name].append(self.children[name].ask("closed", **order))
        return blocks

    def _judge(self, answers: Sequence[Mapping[str, Any]]) -> str:
        own = sum((Usage(one["cpu"], one["switches"]) for one in answers), Usage())
        reading = self._watch.stop(own, self._gpu, len(self.children))
        self.readings.append(reading)
        return disturbed(reading, self.limits)

    def _wanted(self) -> bool:
        return self._lease is not None and self._lease.wanted()

    def _give_way(self) -> None:
        if self._lease is not None and self._lease.wanted():
            self.gave_way += 1
            self._lease.give_way()
