"""The measurement: which scenario when, for how long, and what rows come of it. The budget goes to one stream first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, Literal, cast

from weighbridge.engines.hardware import memory_limit
from weighbridge.registry.schemas import BenchmarkRow
from weighbridge.workers.benchmarking import contention, judgement, statistics
from weighbridge.workers.benchmarking.children import ChildFailed
from weighbridge.workers.benchmarking.gpu import IDLE_SECONDS, Gpu
from weighbridge.workers.benchmarking.judgement import Judged, Ratios
from weighbridge.workers.benchmarking.rounds import (
    BLOCK_REQUESTS,
    BLOCK_SECONDS,
    FEWEST,
    LEAST,
    Course,
    OutOfTime,
    Seen,
)

Mode = Literal["eager", "compiled", "cuda_graph", "onnxruntime"]
Depth = Literal["quick", "full"]

ORIGINAL, AGAIN, CANDIDATE = "original", "again", "candidate"
SHARES = {"single_stream": 0.5, "offline": 0.25, "server": 0.15, "closed": 0.1}
"""Of the budget. The server scenario takes more where its proofs need it; an extra mode gets half of the first two."""
MORE = {"single_stream": 0.4, "offline": 0.03}
"""Of the seconds up to the bound, for rounds beyond those while the interval is wide; offline: of each batch."""
MORE_TIMES = {"single_stream": 10.0, "offline": 1.0}
"""And of the budget: who asks for a short benchmark gets a short one on a busy machine too."""
OFFLINE_MOST = 4.0
"""Of the budget, for the rounds of one batch: more than that a program of seconds a request does not get."""
SERVER_MOST = 0.5
"""Of the budget on top: a program that cannot prove its p99 in that is left without a rate, and says so."""
BATCHES: Mapping[Depth, tuple[int, ...]] = {"quick": (1, 8, 32, 128), "full": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)}
CALLERS: Mapping[Depth, tuple[int, ...]] = {"quick": (2, 4), "full": (2, 4, 8, 16, 32)}
TRIALS: Mapping[Depth, int] = {"quick": 3, "full": 7}
HELPS = 1.05
"""A larger batch must bring this much more rows a second, or the sweep ends."""
SLO_FACTOR = 2.0
"""The server scenario's bound where none is given: so many times the *original's* single-stream p99, so that every
variant of a version is held to one bound, which leaves a request room to wait for one other."""
_MOST_QUERIES = 2000
_WARM_SHARE = 0.04
_ENERGY_SECONDS = 3.0


@dataclass(frozen=True)
class Wish:
    """What to measure: `serving` is the mode in which a host runs the candidate, `modes` come on top."""

    serving: Mode
    modes: Sequence[Mode]
    depth: Depth
    seconds: float
    most: float
    """Seconds until the bound."""
    threads: int
    slo: float | None
    fixed: int | None
    """The only batch that the program takes; None: any."""
    memory: int
    """Bytes of the device."""


@dataclass
class Result:
    """What came of it."""

    rows: list[BenchmarkRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    contended: str = ""
    """What took the machine meanwhile: absolute figures say nothing then."""
    latency: Judged | None = None
    """None: nothing was measured within the bound."""
    throughput: Judged | None = None
    """The candidate's best rows a second over the original's best, with the interval at the candidate's batch."""
    best: float = 0.0
    batch: int = 1
    energy: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


class Measurement:
    """One benchmark. In an A/A run the candidate is the original again."""

    def __init__(self, course: Course, wish: Wish, gpu: Gpu | None) -> None:
        self._course, self._wish, self._gpu = course, wish, gpu
        self._names = tuple(name for name in (ORIGINAL, CANDIDATE, AGAIN) if name in course.children)
        self._candidate = CANDIDATE if CANDIDATE in course.children else AGAIN
        self._unit = wish.fixed or 1
        self._first = Seen()
        self._itself = Ratios([], None)
        self._peaks: dict[str, int] = {}
        self.result = Result()

    def run(self) -> Result:
        """Everything that the bound leaves time for. Raises ChildFailed where something does not run at all."""
        with suppress(OutOfTime):
            self._single_stream()
        if self.result.latency is None:
            return self.result
        self._part("offline", lambda: self._offline(self._wish.serving, SHARES["offline"] * self._wish.seconds))
        if self.result.contended:
            self.result.notes.append("server, closed: left out: beside other work their figures say nothing")
        else:
            self._part("server", self._server)
            self._part("closed", self._closed)
        self._part("memory", self._memory)  # before a compiler's
        if (gpu := self._gpu) is not None:
            self._part("energy", lambda: self._device(gpu))
        for mode in self._wish.modes:
            self._part(mode, partial(self._extra, mode))
        return self.result

    def _part(self, name: str, run: Callable[[], None]) -> None:
        """What is no headline is cut short, and said, instead of passing the bound."""
        try:
            run()
        except OutOfTime:
            self.result.notes.append(f"{name}: cut short, or left out: the benchmark's seconds were over")

    def _single_stream(self) -> None:
        """The comparison that everything else hangs on, from as many rounds as make it sure."""
        for name in self._course.children:
            self._course.ask(name, "warm", batch=self._unit, seconds=_WARM_SHARE * self._wish.seconds)
        self._memory()
        seen = self._course.rounds(
            self._names,
            batch=self._unit,
            seconds=SHARES["single_stream"] * self._wish.seconds,
            most=self._more("single_stream"),
            enough=lambda seen: self._sure(seen.faster(self._candidate, ORIGINAL), seen.faster(AGAIN, ORIGINAL), seen),
        )
        self.result.details["rounds"] = seen.rounds
        if seen.rounds < FEWEST:
            return
        self._first, self._itself = seen, seen.faster(AGAIN, ORIGINAL)
        self.result.contended = self._taken(seen)
        self.result.latency = self._judge(seen.faster(self._candidate, ORIGINAL), seen)
        self.result.throughput = self._judge(seen.more(self._candidate, ORIGINAL), seen)
        self.result.best, self.result.batch = seen.rate(self._candidate), self._unit
        against_itself = {"wall": self._itself.wall, "cpu": self._itself.cpu}
        original = statistics.summary(seen.latencies[ORIGINAL]) | {"throughput": seen.rate(ORIGINAL)}
        self.result.details |= {"against_itself": against_itself, "original": original}
        self._row("single_stream", self._wish.serving, seen, self.result.latency)

    def _more(self, part: str) -> float:
        return min(MORE[part] * self._wish.most, MORE_TIMES[part] * self._wish.seconds)

    def _sure(self, pair: Ratios, itself: Ratios, seen: Seen) -> bool:
        contended = bool(self._taken(seen))
        return all(ratios.precise(contended=contended) for ratios in (pair, itself))

    def _taken(self, seen: Seen) -> str:
        return contention.taken(seen.readings, self._course.limits)

    def _judge(self, pair: Ratios, seen: Seen) -> Judged:
        contended = bool(self._taken(seen) or self.result.contended)
        return judgement.judge(pair, self._itself, contended=contended, threads=self._wish.threads)

    def _memory(self) -> None:
        self.result.details["memory"] = self._course.ask(self._candidate, "memory")

    def _offline(self, mode: Mode, seconds: float, *, paired: bool = True) -> None:
        """Larger batches while they bring more rows a second for either; in the serving mode that is the headline.

        Beside other work a batch is worth what a second of a processor gives: batches run at different moments.
        """
        names = (ORIGINAL, self._candidate) if paired else (self._candidate,)
        batches = self._batches() if mode == self._wish.serving else [self.result.batch]
        best: dict[str, float] = dict.fromkeys(names, 0.0)
        slowest = inf  # rows a second
        for batch in batches:
            slow = batch / slowest  # seconds of a request, if it brings nothing
            try:
                if self._too_slow(batch, slow) or self._too_large(batch):
                    break
                seen = self._batch(mode, names, batch, seconds / len(batches), slow=slow)
            except ChildFailed as failed:
                if failed.kind != "memory" or batch == batches[0]:
                    raise
                self.result.notes.append(f"offline: the batch was lowered from {batch}: {failed}")
                break
            judged = self._judge(seen.more(self._candidate, ORIGINAL), seen) if paired else None
            self._row("offline", mode, seen, judged)
            rates = {name: seen.rate(name, busy=bool(self.result.contended) and seen.on_cpu) for name in names}
            if mode == self._wish.serving:
                self._headline(seen, judged, rates, best)
            if all(rates[name] < HELPS * best[name] for name in names):
                break
            best = {name: max(best[name], rates[name]) for name in names}
            slowest = min(seen.rate(name) for name in names)

    def _batch(self, mode: Mode, names: Sequence[str], batch: int, seconds: float, *, slow: float) -> Seen:
        """One stream of the smallest batch is measured already. A request of `slow` seconds is a block by itself.

        Raises OutOfTime where the bound leaves too few rounds.
        """
        if mode == self._wish.serving and batch == self._unit:
            return self._first
        seen = self._course.rounds(
            names,
            batch=batch,
            seconds=seconds,
            most=self._more("offline"),
            enough=lambda seen: self._sure(seen.more(self._candidate, names[0]), self._itself, seen),
            requests=1 if slow > BLOCK_SECONDS else BLOCK_REQUESTS,
        )
        if seen.rounds < FEWEST:
            raise OutOfTime
        return seen

    def _too_slow(self, batch: int, slow: float) -> bool:
        """Whether the least number of rounds would take several times the budget."""
        needs = LEAST * 4 * slow
        if batch == self._unit or needs <= OFFLINE_MOST * self._wish.seconds:
            return False
        self.result.notes.append(f"offline: batches end before {batch}: the rounds would take {needs:.0f} s")
        return True

    def _headline(
        self, seen: Seen, judged: Judged | None, rates: Mapping[str, float], best: Mapping[str, float]
    ) -> None:
        """Best against best: each at the batch that suits it. The interval keeps its width.

        `best` are the rates of the batches before.
        """
        assert judged is not None, "the serving mode is measured beside the original"
        original = self.result.details["original"]
        if rates[ORIGINAL] > best[ORIGINAL]:
            if self.result.throughput is not None and best[ORIGINAL]:
                self.result.throughput = self.result.throughput.times(best[ORIGINAL] / rates[ORIGINAL])
            original["throughput"] = seen.rate(ORIGINAL)
        if rates[self._candidate] > best[self._candidate]:
            shift = rates[ORIGINAL] / max(rates[ORIGINAL], best[ORIGINAL])
            self.result.throughput = judged.times(shift)
            self.result.best, self.result.batch = seen.rate(self._candidate), seen.batch

    def _batches(self) -> list[int]:
        return [self._wish.fixed] if self._wish.fixed else list(BATCHES[self._wish.depth])

    def _too_large(self, batch: int) -> bool:
        """Whether the growth since the last batch says that this one will not fit: the kernel's end of a process that
        takes too much cannot be caught."""
        if batch == self._unit:
            return False
        limit = memory_limit()
        room = 0.5 * min(self._wish.memory, limit or self._wish.memory)
        last = max((row.batch for row in self.result.rows if row.scenario == "offline"), default=1)
        for name in (ORIGINAL, self._candidate):
            said = self._course.ask(name, "memory")
            peak = max(said["peak"], said.get("reserved", 0))
            first = self._peaks.setdefault(name, peak)
            need = peak + (peak - first) * batch / last
            if need > room:
                reason = f"{name} would need up to {need / (1 << 30):.1f} GiB of {room / (1 << 30):.1f}"
                self.result.notes.append(f"offline: the batch stays at {last}: at {batch} the {reason}")
                return True
        return False

    def _server(self) -> None:
        """Bisect for the highest rate whose p99 within the bound is proven."""
        bound = self._wish.slo or SLO_FACTOR * self.result.details["original"]["p99"]
        single = next(row for row in self.result.rows if row.scenario == "single_stream")
        low, high = 0.0, 1 / single.mean
        found: tuple[float, dict[str, Any], str] | None = None
        share = SHARES["server"] * self._wish.seconds / TRIALS[self._wish.depth]
        left, needed = SERVER_MOST * self._wish.seconds, statistics.queries_needed(_MOST_QUERIES)
        fixed = {"bound": bound, "needed": needed, "most": _MOST_QUERIES}
        for trial in range(TRIALS[self._wish.depth]):
            rate = (low + high) / 2
            needs = 1.2 * needed[0] / rate  # a proof that is cut short proves nothing
            if needs > left:
                self.result.notes.append(f"server: 459 requests at {rate:.3g} a second take longer than the budget")
                break
            order = fixed | {"rate": rate, "seconds": max(share, needs), "seed": trial}
            answer, taken = self._course.once(self._candidate, "server", **order)
            left -= answer["seconds"]
            if answer["proven"]:
                low, found = rate, (rate, answer, taken)
            else:
                high = rate
        else:
            if found is None:
                self.result.notes.append(f"server: no rate down to {high:.3g} a second kept p99 within {bound:.3g} s")
        self.result.details["server_bound"] = bound
        if found is not None:
            rate, answer, taken = found
            self._add("server", answer, batch=self._unit, rate=rate, contended=taken)

    def _closed(self) -> None:
        counts = CALLERS[self._wish.depth]
        seconds = SHARES["closed"] * self._wish.seconds / len(counts)
        for callers in counts:
            order = {"batch": self._unit, "seconds": seconds, "least": 3, "callers": callers}
            answer, taken = self._course.once(self._candidate, "closed", **order)
            self._add("closed", answer, batch=self._unit, concurrency=callers, contended=taken)

    def _extra(self, mode: Mode) -> None:
        """One stream and the headline's batch in another mode, beside the original in the same mode where it can."""
        paired = self._switch(ORIGINAL, mode)
        if not self._switch(self._candidate, mode):
            return
        names = (ORIGINAL, self._candidate) if paired else (self._candidate,)
        half = 0.5 * self._wish.seconds
        for name in names:
            self._course.ask(name, "warm", batch=self._unit, seconds=_WARM_SHARE * self._wish.seconds)
        seen = self._course.rounds(names, batch=self._unit, seconds=half * SHARES["single_stream"])
        if seen.rounds < FEWEST:
            raise OutOfTime
        judged = self._judge(seen.faster(self._candidate, ORIGINAL), seen) if paired else None
        self._row("single_stream", mode, seen, judged)
        self._offline(mode, half * SHARES["offline"], paired=paired)

    def _switch(self, name: str, mode: Mode) -> bool:
        seconds = 0.0
        for batch in {self._unit, self.result.batch}:  # every shape is compiled apart, and before it is measured
            try:
                seconds += self._course.ask(name, "switch", mode=mode, batch=batch)["seconds"]
            except ChildFailed as failed:
                if failed.kind == "died":
                    raise
                self.result.notes.append(f"{mode}: {name} was left out: {failed}")
                return False
        self.result.details.setdefault("switch_seconds", {})[f"{mode} {name}"] = seconds
        return True

    def _device(self, gpu: Gpu) -> None:
        """Device time by events; joule per row above idle, over some seconds of the headline's batch."""
        time = self._course.ask(self._candidate, "device_time", batch=self._unit, count=100)["seconds"]
        self.result.details |= {"device_seconds_p50": time, "clocks": gpu.clocks()}
        idle, before = gpu.idle_watts(), gpu.joules()
        order = {"batch": self.result.batch, "seconds": _ENERGY_SECONDS, "least": 1, "callers": 1}
        answer = self._course.ask(self._candidate, "closed", **order)
        after = gpu.joules()
        if idle is None or before is None or after is None:
            return
        above = after - before - idle * answer["seconds"]
        self.result.energy = max(0.0, above) / (len(answer["latencies"]) * self.result.batch)
        self.result.details["idle"] = {"watts": idle, "seconds": IDLE_SECONDS}

    def _row(self, scenario: str, mode: Mode, seen: Seen, judged: Judged | None) -> None:
        said: dict[str, Any] = {"contended": self._taken(seen)}
        if judged is not None:
            ratio, low, high = judged.compared.ratio, judged.compared.low, judged.compared.high
            said |= {"ratio": ratio, "low": low, "high": high, "clock": judged.clock, "finding": judged.finding}
        throughput = seen.rate(self._candidate)
        self._append(scenario, mode, seen.latencies[self._candidate], throughput, batch=seen.batch, **said)

    def _add(self, scenario: str, answer: Mapping[str, Any], **fields: Any) -> None:
        latencies = answer["latencies"]
        throughput = fields["batch"] * len(latencies) / answer["seconds"]
        self._append(scenario, self._wish.serving, latencies, throughput, **fields)

    def _append(self, scenario: str, mode: Mode, latencies: Sequence[float], throughput: float, **fields: Any) -> None:
        row = BenchmarkRow(
            scenario=cast("Any", scenario), mode=mode, count=len(latencies), throughput=throughput,
            histogram=statistics.histogram(latencies), **statistics.summary(latencies), **fields,
        )  # fmt: skip
        self.result.rows.append(row)
