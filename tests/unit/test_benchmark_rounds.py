"""Rounds decide by what disturbed them, cancel drift, give way to jobs and are not starved. Stand-in processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fixtures.engines import LocalBlobs, make_checkpoint

from weighbridge.engines.manifest import Manifest
from weighbridge.registry.schemas import Benchmark
from weighbridge.workers import benchmark as stage
from weighbridge.workers.benchmarking import statistics
from weighbridge.workers.benchmarking.children import Child, ChildFailed
from weighbridge.workers.benchmarking.contention import Limits, Reading, Watch
from weighbridge.workers.benchmarking.machine import Alone
from weighbridge.workers.benchmarking.measure import AGAIN, CANDIDATE, ORIGINAL, Measurement, Wish
from weighbridge.workers.benchmarking.rounds import LEAST, Course, Noisy


class Told(Watch):
    """A watch that reads what the test says, and goes on with the last."""

    def __init__(self, *readings: Reading) -> None:
        super().__init__(Limits())
        self._told = itertools.chain(readings, itertools.repeat(readings[-1]))

    def stop(self, *_: Any) -> Reading:
        return next(self._told)


QUIET, BUSY = Reading(), Reading(others=0.5)


class Process:
    """A measured process on a machine that gets slower by the block; `batch` rows take as long as 1 + batch / 64."""

    pid = 0

    def __init__(self, seconds: float, drift: Iterator[float], log: list[str], name: str, clock: list[float]) -> None:
        self.seconds, self.log, self.name, self._drift, self.clock = seconds, log, name, drift, clock
        self.limit, self.largest = 1 << 30, 1

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        self.log.append(f"{do} {self.name}")
        self.clock[0] += 0.1
        if do == "memory":
            return {"peak": 1000 + 100 * self.largest}
        if do == "warm":
            return {}
        if do == "switch":
            raise ChildFailed("mode", f"{order['mode']}: there is no compiler")
        batch = order.get("batch", 1)
        if batch > self.limit:
            raise ChildFailed("memory", f"out of memory at {batch}")
        self.largest = max(self.largest, batch)
        took = self.seconds * (1 + batch / 64) * next(self._drift)
        proven = took <= order["bound"] and order["rate"] * took < 0.8 if do == "server" else None
        return {"latencies": [took] * 4, "seconds": 4 * took, "cpu": 0.1, "switches": 0, "proven": proven}


class Bench:
    """A course over an original of 1 ms, itself again, and a candidate."""

    def __init__(
        self, *readings: Reading, candidate: float | None = 0.0005, drift: float = 1.0, lease: Any = None
    ) -> None:
        self.log: list[str] = []
        clock = [0.0]
        slower = (drift**block for block in itertools.count())
        times = {ORIGINAL: 0.001, AGAIN: 0.001} | ({CANDIDATE: candidate} if candidate else {})
        self.processes = {name: Process(seconds, slower, self.log, name, clock) for name, seconds in times.items()}
        children = cast("dict[str, Child]", self.processes)
        watch = Told(*(readings or (QUIET,)))
        self.course = Course(children, watch, cast("Alone", lease), None, lambda: None, lambda: clock[0])

    def measurement(self, **wish: Any) -> Measurement:
        given = {"serving": "eager", "modes": (), "depth": "quick", "seconds": 8.0, "slo": None, "fixed": None}
        return Measurement(self.course, Wish(**cast("Any", {**given, "memory": 1 << 40, **wish})), None)


def test_a_linear_drift_of_the_machine_cancels_out() -> None:
    """Forwards and backwards: the clock falling by a percent a block leaves both ratios as they are."""
    bench = Bench(drift=1.01)
    seen = bench.course.rounds((ORIGINAL, CANDIDATE, AGAIN), batch=1, seconds=0)
    assert bench.log[:6] == [f"closed {name}" for name in (ORIGINAL, CANDIDATE, AGAIN, AGAIN, CANDIDATE, ORIGINAL)]
    assert seen.faster(AGAIN, ORIGINAL) == pytest.approx([1.0] * LEAST, rel=0.001)
    assert seen.faster(CANDIDATE, ORIGINAL) == pytest.approx([2.0] * LEAST, rel=0.001)


def test_a_disturbed_round_does_not_count() -> None:
    """A passing disturbance costs a round; nothing of it is in the numbers."""
    bench = Bench(QUIET, BUSY, QUIET)
    seen = bench.course.rounds((ORIGINAL, AGAIN), batch=1, seconds=0)
    assert seen.rounds == LEAST
    assert len(bench.log) == 4 * (LEAST + 1)
    assert bench.course.reasons == ["other processes took 50% of the processors"]


def test_a_busy_machine_is_noisy() -> None:
    """Picking the quiet rounds out of many busy ones would be picking results."""
    with pytest.raises(Noisy, match="other processes took 50%"):
        Bench(BUSY).course.rounds((ORIGINAL, AGAIN), batch=1, seconds=0)
    with pytest.raises(Noisy, match="other processes"):
        Bench(QUIET, BUSY, QUIET, BUSY, BUSY).course.rounds((ORIGINAL, AGAIN), batch=1, seconds=0)


class Lease:
    """Ordinary jobs that wait, as told; then none."""

    def __init__(self, wanted: Callable[[int], bool]) -> None:
        self.looks, self.ways = itertools.count(), 0
        self._wanted = wanted

    def wanted(self) -> bool:
        return self._wanted(next(self.looks))

    def give_way(self) -> None:
        self.ways += 1


def test_an_interrupted_round_is_repeated() -> None:
    """A job that comes after three blocks gets the machine, and the round starts again from its first block."""
    bench = Bench(lease=Lease(lambda look: look in (4, 5)))
    seen = bench.course.rounds((ORIGINAL, AGAIN), batch=1, seconds=0)
    assert bench.log[:4] == ["closed original", "closed again", "closed again", "closed original"]
    assert (seen.rounds, bench.course.gave_way) == (LEAST, 1)
    assert len(bench.log) == 4 * LEAST + 3


def test_jobs_without_end_do_not_starve_a_benchmark() -> None:
    """Between rounds it gives way every time, but a round that was interrupted once is finished."""
    lease = Lease(lambda _: True)
    bench = Bench(lease=lease)
    assert bench.course.rounds((ORIGINAL, AGAIN), batch=1, seconds=0).rounds == LEAST
    assert lease.ways == 2 * LEAST


def test_the_original_against_itself_finds_no_difference() -> None:
    """The A/A run: one program, two processes, every row `same`."""
    result = Bench(candidate=None).measurement().run()
    assert result.spread == statistics.MIN_SPREAD
    assert {row.finding for row in result.rows if row.scenario in ("single_stream", "offline")} == {"same"}


def test_rows_of_every_scenario() -> None:
    """One stream, larger batches while they help, the highest proven rate, and waiting callers."""
    result = Bench().measurement().run()
    assert [(row.scenario, row.batch, row.concurrency) for row in result.rows] == [
        ("single_stream", 1, 1),
        *(("offline", batch, 1) for batch in (1, 8, 32, 128)),
        ("server", 1, 1),
        ("closed", 1, 2),
        ("closed", 1, 4),
    ]
    single, server = result.rows[0], result.rows[5]
    assert (single.finding, single.ratio) == ("faster", pytest.approx(2.0))
    assert (result.batch, result.best) == (128, pytest.approx(128 / 0.0005 / 3))
    assert server.rate is not None
    assert 0.5 / single.p50 <= server.rate < 0.8 / single.p50
    assert result.details["server_bound"] == pytest.approx(2 * 0.001 * (1 + 1 / 64))


def test_out_of_memory_lowers_the_batch_and_says_so() -> None:
    """Whether the program says so, or its growth foretells that the kernel would end it."""
    bench = Bench()
    bench.processes[CANDIDATE].limit = 31
    result = bench.measurement().run()
    assert result.batch == 8
    assert result.notes == ["offline: the batch was lowered from 32: out of memory at 32"]
    foretold = Bench().measurement(memory=8_000).run()
    assert foretold.batch == 8
    assert "the batch stays at 8: at 32 the original would need" in foretold.notes[0]


def test_a_fixed_batch_is_the_only_one() -> None:
    """A program that takes four rows is measured with four."""
    result = Bench().measurement(fixed=4).run()
    assert {row.batch for row in result.rows} == {4}


def test_a_mode_that_is_not_there_is_a_note() -> None:
    """The rest is measured."""
    result = Bench().measurement(modes=("compiled",)).run()
    assert {row.mode for row in result.rows} == {"eager"}
    assert "compiled: candidate was left out: compiled: there is no compiler" in result.notes


def test_an_original_that_differs_from_itself_decides_nothing() -> None:
    """Something disturbs that the counters do not show."""
    bench = Bench()
    bench.processes[AGAIN].seconds = 0.0007
    with pytest.raises(Noisy, match="two runs of the original differ by 43%"):
        bench.measurement().run()


def test_a_machine_that_stays_busy_gives_no_fact(
    tmp_path: Path, make_manifest: Callable[..., Manifest], local_blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every try: the verdict is noisy, and the row says invalid and by what."""
    artifact = local_blobs.add(make_manifest(make_checkpoint(tmp_path / "c.safetensors")).canonical())
    bench = Bench(candidate=None)

    def start(job: Any, running: Any) -> Any:
        cold = {"load": 0.1, "first": 0.01, "fixed": None, "inputs": "synthetic"}
        job.cold = dict.fromkeys(bench.processes, cold)
        return bench.processes

    monkeypatch.setattr(stage, "_start", start)
    outcome = stage.benchmark(
        stage.BenchmarkTask(artifact, artifact, tries=2, seconds=0.1), cache=local_blobs, watch=Told(BUSY)
    )
    assert outcome.verdict == "noisy"
    assert outcome.reason == "try 2 of 2: other processes took 50% of the processors"
    seen = Benchmark.model_validate(outcome.facts["benchmark"])
    assert (seen.status, seen.reason, seen.p50, seen.speedup) == ("invalid_noisy", outcome.reason, None, None)
    assert seen.environment["rounds_spoilt"] == 6
