"""Rounds are all kept, cancel drift, give way to jobs, are not starved, and end. Stand-in processes."""

from __future__ import annotations

import itertools
import math
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
from weighbridge.workers.benchmarking.judgement import SHIFT
from weighbridge.workers.benchmarking.machine import Alone
from weighbridge.workers.benchmarking.measure import AGAIN, CANDIDATE, ORIGINAL, Measurement, Wish
from weighbridge.workers.benchmarking.rounds import FEWEST, LEAST, Course, OutOfTime, Seen


class Told(Watch):
    """A watch that reads what the test says, and goes on with the last."""

    def __init__(self, *readings: Reading) -> None:
        super().__init__(Limits())
        self._told = itertools.chain(readings, itertools.repeat(readings[-1]))

    def stop(self, *_: Any) -> Reading:
        return next(self._told)


QUIET, BUSY = Reading(), Reading(others=0.5)


class Process:
    """A measured process on a machine that gets slower by the block; `batch` rows take as long as 1 + batch / 64.

    `waits`: how many times longer a request takes on the wall than of a processor.
    """

    pid = 0

    def __init__(self, seconds: float, drift: Iterator[float], log: list[str], name: str, clock: list[float]) -> None:
        self.seconds, self.log, self.name, self._drift, self.clock = seconds, log, name, drift, clock
        self.limit, self.largest = 1 << 30, 1
        self.waits: Iterator[float] = itertools.repeat(1.0)

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
        wall = took * next(self.waits)
        proven = wall <= order["bound"] and order["rate"] * wall < 0.8 if do == "server" else None
        answer = {"latencies": [wall] * 4, "seconds": 4 * wall, "busy": [took] * 4, "proven": proven}
        return {**answer, "cpu": 0.1, "switches": 0}


class Bench:
    """A course over an original of 1 ms, itself again, and a candidate."""

    def __init__(
        self,
        *readings: Reading,
        candidate: float | None = 0.0005,
        drift: float = 1.0,
        lease: Any = None,
        bound: float = 1e9,
    ) -> None:
        self.log: list[str] = []
        self.clock = clock = [0.0]
        slower = (drift**block for block in itertools.count())
        times = {ORIGINAL: 0.001, AGAIN: 0.001} | ({CANDIDATE: candidate} if candidate else {})
        self.processes = {name: Process(seconds, slower, self.log, name, clock) for name, seconds in times.items()}
        children = cast("dict[str, Child]", self.processes)
        watch = Told(*(readings or (QUIET,)))

        def beat() -> None:
            if clock[0] >= bound:
                raise OutOfTime

        self.course = Course(children, watch, cast("Alone", lease), None, beat, lambda: clock[0])

    def measurement(self, **wish: Any) -> Measurement:
        given = {"serving": "eager", "modes": (), "depth": "quick", "seconds": 8.0, "slo": None, "fixed": None}
        given |= {"most": 100.0, "threads": 1}
        return Measurement(self.course, Wish(**cast("Any", {**given, "memory": 1 << 40, **wish})), None)


def test_a_linear_drift_of_the_machine_cancels_out() -> None:
    """Forwards and backwards: the clock falling by a percent a block leaves both ratios as they are."""
    bench = Bench(drift=1.01)
    seen = bench.course.rounds((ORIGINAL, CANDIDATE, AGAIN), batch=1, seconds=0)
    assert bench.log[:6] == [f"closed {name}" for name in (ORIGINAL, CANDIDATE, AGAIN, AGAIN, CANDIDATE, ORIGINAL)]
    for ratios, expected in ((seen.faster(AGAIN, ORIGINAL), 1.0), (seen.faster(CANDIDATE, ORIGINAL), 2.0)):
        assert ratios.wall == pytest.approx([expected] * LEAST, rel=0.001)
        assert ratios.cpu == pytest.approx([expected] * LEAST, rel=0.001)


def test_every_round_is_kept() -> None:
    """Whatever the machine did meanwhile; that is noted beside it. A passing disturbance marks nothing."""
    bench = Bench(QUIET, BUSY, QUIET)
    seen = bench.course.rounds((ORIGINAL, AGAIN), batch=1, seconds=0)
    assert (seen.rounds, len(bench.log)) == (LEAST, 4 * LEAST)
    assert [reading.others for reading in seen.readings[:3]] == [0, 0.5, 0]
    assert Bench(QUIET, BUSY, QUIET).measurement().run().contended == ""


def test_how_far_disturbance_moves_a_ratio_is_seen_in_the_run() -> None:
    """Of two programs of 1 ms the neighbours double what one costs in most requests: the least disturbed are equal."""
    seen = Seen()
    block = {"latencies": [0.001] * 20, "seconds": 0.02, "busy": [0.001] * 20}
    suffers = {**block, "busy": [0.001, 0.001] + [0.002] * 18}
    for _ in range(LEAST):
        seen.add({ORIGINAL: [block, block], CANDIDATE: [suffers, suffers]}, QUIET)
    ratios = seen.faster(CANDIDATE, ORIGINAL)
    assert ratios.cpu == [0.5] * LEAST
    assert (ratios.wall_moved, ratios.cpu_moved) == (0, pytest.approx(math.log(2)))


def test_a_busy_machine_gives_the_ratio_and_marks_the_rest() -> None:
    """A faster candidate is faster; what took the machine is said of its figures, and its SLO is not asked for."""
    bench = Bench(BUSY)
    result = bench.measurement().run()
    assert result.contended == "other processes took 50% of the processors"
    assert result.latency is not None
    assert (result.latency.finding, result.latency.compared.ratio) == ("faster", pytest.approx(2.0))
    assert result.latency.compared.low <= 2.0 / (1 + SHIFT) < result.latency.compared.ratio
    assert {row.scenario for row in result.rows} == {"single_stream", "offline"}
    assert all(row.contended and row.low is not None and row.finding == "faster" for row in result.rows)


def test_beside_other_work_processor_time_decides() -> None:
    """Requests of the candidate wait three times as long as they run, the original's never: it is still twice as fast.
    On a free machine what callers feel decides."""
    for reading, clock, ratio in ((BUSY, "both", 2 / 3), (QUIET, "wall", 2 / 3)):
        bench = Bench(reading)
        bench.processes[CANDIDATE].waits = itertools.repeat(3.0)
        judged = bench.measurement().run().latency
        assert judged is not None
        assert (judged.clock, judged.compared.ratio) == (clock, pytest.approx(ratio))
        assert judged.finding == ("slower" if reading is QUIET else "same"), "the clocks contradict each other"
    bench = Bench(BUSY)
    bench.processes[CANDIDATE].waits = itertools.cycle([1.0, 1.0, 4.0, 4.0])
    judged = bench.measurement().run().latency
    assert judged is not None
    assert (judged.clock, judged.compared.ratio, judged.finding) == ("cpu", pytest.approx(2.0), "faster")


def test_wide_intervals_get_more_rounds_up_to_a_bound() -> None:
    """Twice as many seconds and more, but never past the share of the bound that one stream has."""
    bench = Bench()
    short = bench.measurement().run().details["rounds"]
    bench = Bench()
    bench.processes[CANDIDATE].waits = itertools.cycle([1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 3.0, 3.0])
    result = bench.measurement().run()
    assert result.details["rounds"] > 2 * short
    assert bench.clock[0] < 100


@pytest.mark.parametrize("bound", [0.5, 2.0, 6.0, 9.0, 12.0])
def test_it_ends_at_its_bound_with_what_it_has(bound: float) -> None:
    """Too few rounds are no result; enough of them are, and what was left out is said."""
    bench = Bench(bound=bound)
    result = bench.measurement(modes=("compiled",)).run()
    assert bench.clock[0] <= bound + 1
    if result.latency is None:
        assert (result.rows, result.details.get("rounds", 0) < FEWEST) == ([], True)
    else:
        assert (result.latency.finding, result.best > 0, "memory" in result.details) == ("faster", True, True)
        assert any("the benchmark's seconds were over" in note for note in result.notes)


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
    result = Bench(lease=lease, bound=20.0).measurement().run()
    assert result.latency is not None
    assert result.latency.finding == "faster"


def test_the_original_against_itself_finds_no_difference() -> None:
    """The A/A run: one program, two processes, every row `same`."""
    result = Bench(candidate=None).measurement().run()
    assert result.latency is not None
    assert result.latency.spread == pytest.approx(statistics.MIN_SPREAD)
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
    assert (single.finding, single.ratio, single.clock) == ("faster", pytest.approx(2.0), "wall")
    assert result.throughput is not None
    assert result.throughput.compared.ratio == pytest.approx(2.0)
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


def test_an_original_that_differs_from_itself_decides_little() -> None:
    """Something disturbs that the counters do not show: the interval is as wide as that."""
    bench = Bench(candidate=0.0008)
    bench.processes[AGAIN].seconds = 0.0007
    judged = bench.measurement().run().latency
    assert judged is not None
    assert (judged.finding, judged.spread >= 0.42) == ("same", True)
    assert (judged.compared.low < 1 < judged.compared.ratio) is True


@pytest.fixture
def stand_in(
    tmp_path: Path, make_manifest: Callable[..., Manifest], local_blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Run the stage on stand-in processes; return its verdict, its reason and the row."""
    artifact = local_blobs.add(make_manifest(make_checkpoint(tmp_path / "c.safetensors")).canonical())

    def run(bench: Bench, reading: Reading, **task: Any) -> Any:
        def start(job: Any, running: Any) -> Any:
            cold = {"load": 0.1, "first": 0.01, "fixed": None, "inputs": "synthetic"}
            job.cold = dict.fromkeys(bench.processes, cold)
            return bench.processes

        monkeypatch.setattr(stage, "_start", start)
        told = stage.BenchmarkTask(artifact, artifact, seconds=0.1, **task)
        outcome = stage.benchmark(told, cache=local_blobs, watch=Told(reading))
        return outcome.verdict, outcome.reason, Benchmark.model_validate(outcome.facts["benchmark"])

    return run


def test_a_busy_machine_gives_a_marked_fact(stand_in: Callable[..., Any]) -> None:
    """Valid, with the interval and what took the machine; the words give no latency."""
    verdict, reason, seen = stand_in(Bench(candidate=None), BUSY)
    assert (verdict, seen.status, seen.finding) == ("passed", "valid", "same")
    assert seen.contended == "other processes took 50% of the processors"
    assert seen.speedup_low < 1 < seen.speedup_high
    assert (seen.speedup, seen.spread) == (1.0, pytest.approx(1.02 * (1 + SHIFT) - 1))
    assert reason == (
        "no difference from the original is shown (0.85–1.17 × its speed), measured beside other work: "
        "other processes took 50% of the processors"
    )


def test_what_was_not_measured_in_time_is_no_fact(stand_in: Callable[..., Any]) -> None:
    """The verdict is noisy, and the row says what the time went to."""
    verdict, reason, seen = stand_in(Bench(candidate=None), BUSY, limit=1e-9)
    assert (verdict, seen.status, seen.p50, seen.speedup) == ("noisy", "invalid_noisy", None, None)
    assert seen.reason == reason
    assert reason.startswith("the 1e-09 s of a benchmark were over while 0 of at least 5 rounds were measured")
