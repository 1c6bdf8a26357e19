"""The stage benchmark says what it cannot measure, and by whose fault, before it starts or by what a process says."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures.engines import LocalBlobs, make_checkpoint

from weighbridge.engines.manifest import Manifest
from weighbridge.workers import benchmark as stage
from weighbridge.workers.benchmark import BenchmarkTask, benchmark
from weighbridge.workers.benchmarking import scenarios
from weighbridge.workers.benchmarking.children import Child, ChildFailed
from weighbridge.workers.benchmarking.machine import Machine
from weighbridge.workers.confined import work
from weighbridge.workers.outcome import Outcome


@pytest.fixture
def artifact(tmp_path: Path, make_manifest: Callable[..., Manifest], local_blobs: LocalBlobs) -> Callable[..., str]:
    """Add the manifest of a small MLP, with changes."""
    path = make_checkpoint(tmp_path / "c.safetensors")
    return lambda **changes: local_blobs.add(make_manifest(path, **changes).canonical())


def test_what_the_machine_has_not_is_not_applicable(
    artifact: Callable[..., str], local_blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such device, or no such engine: the variant is no worse for it."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    original = artifact()
    outcome = benchmark(BenchmarkTask(original, original, device="cuda"), cache=local_blobs)
    assert (outcome.verdict, "nvidia-ml-py" in outcome.reason) == ("not_applicable", True)
    strange = artifact(engine={"name": "tensorrt"}, variant="trt")
    outcome = benchmark(BenchmarkTask(strange, original), cache=local_blobs)
    assert outcome.verdict == "not_applicable"
    assert outcome.reason == "the variant trt needs tensorrt, which is not installed here"


def test_waiting_for_the_machine_shows_progress_and_can_be_ended(
    tmp_path: Path, artifact: Callable[..., str], local_blobs: LocalBlobs
) -> None:
    """A job that lost its lease meanwhile stops waiting."""
    machine, original = Machine(tmp_path / "machine"), artifact()

    class Lost(Exception):
        pass

    def progress(share: float) -> None:
        raise Lost(share)

    with machine.working(), pytest.raises(Lost):
        benchmark(BenchmarkTask(original, original), cache=local_blobs, progress=progress, machine=machine)


@pytest.mark.parametrize(
    ("failed", "verdict", "reason"),
    [
        (
            ChildFailed("engine", "no kernel"),
            "rejected",
            "the artifact does not run: no kernel",
        ),
        (ChildFailed("memory", "out of memory"), "rejected", "the artifact does not run: out of memory"),
        (ChildFailed("input", "input text: BYTES inputs"), "not_applicable", "nothing to measure with"),
    ],
)
def test_a_failure_is_the_artifacts_or_nobodys(failed: ChildFailed, verdict: str, reason: str) -> None:
    """What does not run is rejected; what has no inputs to run on is not."""
    outcome = stage._failed(failed)
    assert outcome.verdict == verdict
    assert reason in outcome.reason


def test_building_yields_the_processor_and_measuring_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A low priority is a thread's: what starts from here afterwards, the measured processes too, has ours."""
    ours, seen = os.getpriority(os.PRIO_PROCESS, 0), list[int]()

    def building(task: object, desk: object) -> Outcome:
        seen.append(os.getpriority(os.PRIO_PROCESS, 0))
        return Outcome.passed("built")

    monkeypatch.setattr(work, "WORK", {str: building})
    work.Here().perform("a task", SimpleNamespace(), lambda: None, niceness=11)
    assert seen == [max(11, ours)]
    started = subprocess.run([sys.executable, "-c", "import os; print(os.nice(0))"], capture_output=True, check=True)
    assert (os.getpriority(os.PRIO_PROCESS, 0), int(started.stdout)) == (ours, ours)


def test_a_process_that_ends_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line that it wrote, or the signal and what that usually means."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Child(1, lambda: None) as child, pytest.raises(ChildFailed, match="exit code 1") as caught:
        child.ask("start")
    assert caught.value.kind == "died"


def test_waiting_callers_wait_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With four callers a request takes four times as long as it runs, and the throughput stays."""
    monkeypatch.setattr(
        scenarios, "time", SimpleNamespace(perf_counter=itertools.count().__next__, process_time=lambda: 0.5)
    )
    samples = scenarios.closed(lambda _: None, [{}, {}], seconds=0, least=10, callers=4)
    assert samples.latencies == [1, 2, 3] + [4] * 37
    assert samples.seconds == 40


def test_a_server_stops_as_soon_as_it_is_certain() -> None:
    """459 requests in time prove p99; more late ones than the rest could make up for disprove it."""
    proven = scenarios.server(lambda _: None, [{}], rate=1e6, bound=10, needed=[459], most=2000, seconds=60, seed=0)
    assert (proven.proven, len(proven.latencies)) == (True, 459)
    late = scenarios.server(lambda _: None, [{}], rate=1e6, bound=0, needed=[459], most=600, seconds=60, seed=0)
    assert (late.proven, len(late.latencies)) == (False, 1)
    short = scenarios.server(lambda _: None, [{}], rate=1e6, bound=10, needed=[459], most=600, seconds=0, seed=0)
    assert short.proven is None
