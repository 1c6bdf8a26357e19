"""The stage benchmark with real processes: the A/A run, a machine with hogs on it, and the command of a GPU machine.

No assertion depends on how quiet this machine is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path

import numpy as np
import pytest
from fixtures.engines import LocalBlobs, make_checkpoint
from safetensors.numpy import save

from weighbridge.engines.hardware import describe
from weighbridge.engines.manifest import Manifest
from weighbridge.registry.schemas import Benchmark
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.folder import FolderStore
from weighbridge.workers.benchmark import BenchmarkTask, benchmark, main
from weighbridge.workers.benchmarking.contention import Limits, Watch
from weighbridge.workers.benchmarking.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ANYTHING = Limits(inf, inf, inf, inf, 0, inf)
"""A watch that calls nothing a disturbance: the numbers are wrong on a busy machine, what is made of them is not."""
LIMIT = 240.0


@pytest.fixture
def artifact(tmp_path: Path, make_manifest: Callable[..., Manifest], local_blobs: LocalBlobs) -> str:
    return local_blobs.add(make_manifest(make_checkpoint(tmp_path / "c.safetensors")).canonical())


@pytest.fixture
def hogs() -> Iterator[None]:
    """A busy process on every processor, for as long as the test takes."""
    running = []
    try:
        for processor in os.sched_getaffinity(0):
            running.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            os.sched_setaffinity(running[-1].pid, {processor})
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_the_original_against_itself_is_the_same(tmp_path: Path, artifact: str, local_blobs: LocalBlobs) -> None:
    """The A/A run: no difference, in every scenario's row; with the inputs of the evaluation set."""
    pixels = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    dataset = local_blobs.add(save({"pixels": pixels, "labels": np.zeros(50, np.int64)}))
    task = BenchmarkTask(artifact, artifact, dataset=dataset, seconds=0.5)
    machine, shares = Machine(tmp_path / "machine"), [0.0]
    outcome = benchmark(task, cache=local_blobs, progress=shares.append, machine=machine, watch=Watch(ANYTHING))
    assert outcome.verdict == "passed", outcome.reason
    assert outcome.reason.startswith("no difference from the original is shown")
    seen = Benchmark.model_validate(json.loads(json.dumps(outcome.facts["benchmark"])))
    assert (seen.status, seen.finding, seen.speedup, seen.kind) == ("valid", "same", 1.0, describe().kind)
    assert {row.scenario for row in seen.rows} >= {"single_stream", "offline", "closed"}
    assert all(sum(row.histogram.values()) == row.count for row in seen.rows)
    assert all(0 < row.p50 <= row.p90 <= row.p99 for row in seen.rows)
    assert seen.memory is not None
    assert seen.load_seconds is not None
    assert (seen.memory > 0, seen.load_seconds > 0, seen.environment["inputs"]) == (True, True, "real")
    assert (shares == sorted(shares), shares[-1]) == (True, 1.0)
    with machine.working():
        pass


@pytest.mark.usefixtures("hogs")
def test_beside_hogs_it_ends_with_the_ratio(
    tmp_path: Path, make_manifest: Callable[..., Manifest], local_blobs: LocalBlobs, artifact: str
) -> None:
    """Within its bound; a twin of the original is the same, by an interval that 1 lies in. What took the machine is
    said, and the figures that it spoils are marked."""
    twin = make_manifest(make_checkpoint(tmp_path / "t.safetensors"), variant="twin")
    task = BenchmarkTask(local_blobs.add(twin.canonical()), artifact, seconds=0.4, limit=LIMIT)
    started = time.monotonic()
    outcome = benchmark(task, cache=local_blobs, machine=Machine(tmp_path / "machine"))
    assert time.monotonic() - started < LIMIT + 10
    assert outcome.verdict == "passed", outcome.reason
    seen = Benchmark.model_validate(outcome.facts["benchmark"])
    assert (seen.status, seen.finding) == ("valid", "same")
    assert "other processes took" in seen.contended
    assert seen.speedup_low is not None
    assert seen.speedup_high is not None
    assert seen.speedup_low < 1 < seen.speedup_high
    assert {row.scenario for row in seen.rows} == {"single_stream", "offline"}
    assert "measured beside other work" in outcome.reason


def test_a_stream_of_ordinary_jobs_does_not_keep_it_from_ending(
    tmp_path: Path, artifact: str, local_blobs: LocalBlobs
) -> None:
    """It gives way to job after job, and ends with a ratio all the same; the jobs go on meanwhile."""
    machine, ended, done = Machine(tmp_path / "machine"), threading.Event(), []

    def jobs() -> None:
        while not ended.is_set():
            with machine.working():
                done.append(ended.wait(0.05))

    threads = [threading.Thread(target=jobs) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        outcome = benchmark(BenchmarkTask(artifact, artifact, seconds=0.4), cache=local_blobs, machine=machine)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert outcome.verdict == "passed", outcome.reason
    assert outcome.facts["benchmark"]["environment"]["gave_way"] > 0
    assert len(done) > 5


def test_a_job_that_never_ends_costs_no_more_than_the_bound(
    tmp_path: Path, artifact: str, local_blobs: LocalBlobs
) -> None:
    """Nothing was measured; the row says what it waited for."""
    machine = Machine(tmp_path / "machine")
    with machine.working():
        outcome = benchmark(BenchmarkTask(artifact, artifact, limit=0.2), cache=local_blobs, machine=machine)
    assert outcome.verdict == "noisy"
    assert outcome.reason == (
        "the 0.2 s of a benchmark were over while waiting for ordinary jobs of this machine to end"
    )
    assert outcome.facts["benchmark"]["status"] == "invalid_noisy"


def test_the_command_prints_a_table_and_writes_what_is_imported(
    tmp_path: Path,
    make_manifest: Callable[..., Manifest],
    local_blobs: LocalBlobs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a machine without Celery and a database; the exit code says whether it is a fact."""
    manifest = make_manifest(make_checkpoint(tmp_path / "c.safetensors"))
    other = make_manifest(make_checkpoint(tmp_path / "d.safetensors", 2), variant="other")
    (tmp_path / "store").mkdir()
    blobs = Blobs(FolderStore(tmp_path / "store"))
    for one in (manifest, other):
        for digest in (*(file.digest for file in one.files), one.program.digest):
            blobs.put_bytes(local_blobs(str(digest)).read_bytes())
    original, candidate = (blobs.put_bytes(one.canonical()).digest for one in (manifest, other))
    arguments = [candidate, "--against", original, "--blobs", str(tmp_path / "store"), "--seconds", "0.2"]
    arguments += ["--json", str(tmp_path / "out.json"), "--machine", str(tmp_path / "machine")]
    code = main(arguments)
    (row,) = json.loads((tmp_path / "out.json").read_text())
    seen = Benchmark.model_validate(row)
    assert (code, seen.status) == (0, "valid")
    printed = capsys.readouterr().out
    assert candidate[:12] in printed
    assert "scenario" in printed
