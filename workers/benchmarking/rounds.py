"""Rounds: short blocks of each measured process in turn, forwards and backwards, only one running at a time.

A round is `A B C C B A`: A the original, B the candidate, C the original again. So every pair is an ABBA, a linear
drift of the machine cancels out of each ratio, and the A/A ratios come from the same moments as those they judge.
Every round counts, whatever the machine did meanwhile: that is noted beside it, and who picks rounds picks results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weighbridge.workers.benchmarking import contention
from weighbridge.workers.benchmarking.children import Child
from weighbridge.workers.benchmarking.contention import Reading, Usage, Watch
from weighbridge.workers.benchmarking.gpu import Gpu
from weighbridge.workers.benchmarking.judgement import Ratios
from weighbridge.workers.benchmarking.machine import Alone

LEAST = 8
"""Rounds, at least: of fewer the interval of their ratios is not one of 99%."""
FEWEST = 5
"""Rounds that say something where the time is over; fewer say nothing."""
BLOCK_SECONDS = 0.02
"""Long beside a scheduler's slice of 4 ms, short beside what makes a machine drift."""
BLOCK_REQUESTS = 3


_TICK = 1e-9
"""The finest that the processor's clock tells."""
_UNDISTURBED = 0.05
"""The quantile of requests that counts as the least disturbed ones: a single one may be an error of a clock."""


class OutOfTime(Exception):
    """The benchmark reached the bound of its seconds. What was measured until then stands."""


@dataclass(frozen=True)
class Sample:
    """One process in one round: median seconds of a request; rows a second; processor seconds of the usual request."""

    p50: float
    rate: float
    busy: float


@dataclass
class Seen:
    """What the rounds gave, by process: every latency in seconds, a sample a round. `readings`: one a round."""

    batch: int = 1
    on_cpu: bool = True
    """Whether the processor's time is that of the requests: not where a GPU computes."""
    latencies: dict[str, list[float]] = field(default_factory=dict)
    busy: dict[str, list[float]] = field(default_factory=dict)
    """Processor seconds of a request, by slices."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return len(self.readings)

    def faster(self, name: str, base: str) -> Ratios:
        """Per round, `base`'s p50 over `name`'s; and its processor time of a request over the other's."""
        return self._ratios(name, base, lambda here, there: there.p50 / here.p50)

    def more(self, name: str, base: str) -> Ratios:
        """Per round, `name`'s throughput over `base`'s; and that of a second of a processor."""
        return self._ratios(name, base, lambda here, there: here.rate / there.rate)

    def rate(self, name: str, *, busy: bool = False) -> float:
        """The median rows a second, or those of a second of a processor."""
        return float(np.median([self.batch / one.busy if busy else one.rate for one in self.samples[name]]))

    def add(self, blocks: Mapping[str, Sequence[Mapping[str, Any]]], reading: Reading) -> None:
        for name, mine in blocks.items():
            latencies = [one for block in mine for one in block["latencies"]]
            rate = self.batch * len(latencies) / sum(block["seconds"] for block in mine)
            busy = [max(_TICK, one) for block in mine for one in block["busy"]]
            self.latencies.setdefault(name, []).extend(latencies)
            self.busy.setdefault(name, []).extend(busy)
            sample = Sample(float(np.median(latencies)), rate, float(np.median(busy)))
            self.samples.setdefault(name, []).append(sample)
        self.readings.append(reading)

    def _ratios(self, name: str, base: str, wall: Callable[[Sample, Sample], float]) -> Ratios:
        pairs = list(zip(self.samples[name], self.samples[base], strict=True))
        cpu = [there.busy / here.busy for here, there in pairs] if self.on_cpu else None
        moved = (_moved(values[name], values[base]) for values in (self.latencies, self.busy))
        return Ratios([wall(here, there) for here, there in pairs], cpu, *moved)


def _moved(one: Sequence[float], other: Sequence[float]) -> float:
    """How far the ratio of the medians lies from that of the least disturbed requests, as a logarithm."""
    inflated = [np.subtract(*np.log(np.quantile(values, (0.5, _UNDISTURBED)))) for values in (one, other)]
    return abs(float(inflated[0] - inflated[1]))


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
        self.gave_way = 0
        self.over = False
        """The bound is reached: a child may be in the middle of an answer, and is asked nothing any more."""
        self._watch, self._lease, self._gpu, self._beat, self._clock = watch, lease, gpu, beat, clock

    def rounds(
        self,
        names: Sequence[str],
        *,
        batch: int,
        seconds: float,
        most: float = 0.0,
        enough: Callable[[Seen], bool] = lambda _: True,
        requests: int = BLOCK_REQUESTS,
    ) -> Seen:
        """For `seconds`, and on while they are not `enough`, for `most` seconds; LEAST rounds, if the bound allows it.

        Whether they are enough must follow from how sure they are, never from what they say. Raises ChildFailed.
        """
        seen, start = Seen(batch, on_cpu=self._gpu is None), self._clock()

        def more() -> bool:
            took = self._clock() - start
            return seen.rounds < LEAST or took < seconds or (took < most and not enough(seen))

        with suppress(OutOfTime), self._within():
            while more():
                self._beat()
                seen.add(*self._round(names, batch, requests))
        return seen

    def once(self, name: str, do: str, **order: Any) -> tuple[dict[str, Any], str]:
        """One order that is measured by itself, and what took the machine meanwhile. Raises OutOfTime, ChildFailed."""
        with self._within():
            self._beat()
            self._give_way()
            self._watch.start()
            answer = self.children[name].ask(do, **order)
        return answer, contention.taken([self._read([answer])], self.limits)

    def ask(self, name: str, do: str, **order: Any) -> dict[str, Any]:
        """Raises OutOfTime, ChildFailed."""
        with self._within():
            return self.children[name].ask(do, **order)

    @contextmanager
    def _within(self) -> Iterator[None]:
        """Once the bound was reached nothing runs any more: neither is the machine ours then."""
        if self.over:
            raise OutOfTime
        try:
            yield
        except OutOfTime:
            self.over = True
            raise

    def _round(
        self, names: Sequence[str], batch: int, requests: int
    ) -> tuple[dict[str, list[dict[str, Any]]], Reading]:
        """The blocks by name. What an ordinary job interrupted starts again, once: so neither waits without end."""
        for patient in (False, True):
            self._give_way()
            self._watch.start()
            blocks = self._blocks(names, batch, requests, patient)
            if blocks is not None:
                return blocks, self._read([block for each in blocks.values() for block in each])
        raise AssertionError("a patient round ends")

    def _blocks(
        self, names: Sequence[str], batch: int, requests: int, patient: bool
    ) -> dict[str, list[dict[str, Any]]] | None:
        blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for name in (*names, *reversed(names)):
            if not patient and self._wanted():
                return None
            order = {"batch": batch, "seconds": BLOCK_SECONDS, "least": requests, "callers": 1}
            blocks[name].append(self.children[name].ask("closed", **order))
        return blocks

    def _read(self, answers: Sequence[Mapping[str, Any]]) -> Reading:
        own = sum((Usage(one["cpu"], one["switches"]) for one in answers), Usage())
        self.readings.append(self._watch.stop(own, self._gpu, len(self.children)))
        return self.readings[-1]

    def _wanted(self) -> bool:
        return self._lease is not None and self._lease.wanted()

    def _give_way(self) -> None:
        if self._lease is not None and self._lease.wanted():
            self.gave_way += 1
            self._lease.give_way()
