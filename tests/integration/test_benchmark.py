"""The stage benchmark with real processes: the A/A run, a machine with a hog on it, and the command of a GPU machine.

No assertion depends on how quiet this machine is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

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
from weighbridge.workers.benchmarking.contention import Limits, Reading, Watch, disturbed
from weighbridge.workers.benchmarking.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SPOILT = 3
"""Rounds that are more than the share of Limits.disturbed."""
ANYTHING = Limits(inf, inf, inf, inf, 0, inf, inf)
"""A watch that lets everything pass: the numbers are wrong on a busy machine, what is made of them is not."""


@pytest.fixture
def artifact(tmp_path: Path, make_manifest: Callable[..., Manifest], local_blobs: LocalBlobs) -> str:
    return local_blobs.add(make_manifest(make_checkpoint(tmp_path / "c.safetensors")).canonical())


class Hogs(Watch):
    """Runs a hog on every processor from the first round on; ends them after three, and sees nothing from then on."""

    def __init__(self) -> None:
        super().__init__(Limits(spread=inf))
        self.running: list[subprocess.Popen[bytes]] = []
        self.reasons: list[str] = []

    def start(self) -> None:
        for processor in os.sched_getaffinity(0) if not self.reasons and not self.running else ():
            self.running.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            os.sched_setaffinity(self.running[-1].pid, {processor})
        super().start()

    def stop(self, *given: Any) -> Reading:
        if not self.running:
            return Reading()
        seen = super().stop(*given)
        self.reasons.append(disturbed(seen, self.limits))
        if len(self.reasons) == SPOILT:
            self.end()
        return seen

    def end(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()
        self.running.clear()


@pytest.fixture
def hogs() -> Iterator[Hogs]:
    made = Hogs()
    yield made
    made.end()


def test_the_original_against_itself_is_the_same(tmp_path: Path, artifact: str, local_blobs: LocalBlobs) -> None:
    """The A/A run: no difference, in every scenario's row; with the inputs of the evaluation set."""
    pixels = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    dataset = local_blobs.add(save({"pixels": pixels, "labels": np.zeros(50, np.int64)}))
    task = BenchmarkTask(artifact, artifact, dataset=dataset, seconds=0.5)
    machine, shares = Machine(tmp_path / "machine"), [0.0]
    outcome = benchmark(task, cache=local_blobs, progress=shares.append, machine=machine, watch=Watch(ANYTHING))
    assert outcome.verdict == "passed", outcome.reason
    assert outcome.reason.endswith("as fast as the original")
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


def test_beside_a_hog_it_is_repeated_until_the_machine_is_quiet(
    artifact: str, local_blobs: LocalBlobs, hogs: Hogs
) -> None:
    """The first try is given up by what the kernel's own counters say; when the hog has ended, the second counts."""
    outcome = benchmark(BenchmarkTask(artifact, artifact, seconds=0.2, tries=2), cache=local_blobs, watch=hogs)
    assert all("other processes took" in reason for reason in hogs.reasons)
    assert outcome.verdict == "passed", outcome.reason
    seen = Benchmark.model_validate(outcome.facts["benchmark"])
    assert (seen.status, seen.finding) == ("valid", "same")
    assert seen.environment["rounds_spoilt"] == len(hogs.reasons) == SPOILT


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
    arguments += ["--tries", "1", "--json", str(tmp_path / "out.json"), "--machine", str(tmp_path / "machine")]
    code = main(arguments)
    (row,) = json.loads((tmp_path / "out.json").read_text())
    seen = Benchmark.model_validate(row)
    assert (code, seen.status) in ((0, "valid"), (3, "invalid_noisy"))
    printed = capsys.readouterr().out
    assert candidate[:12] in printed
    assert "scenario" in printed
