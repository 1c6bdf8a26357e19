"""The stage benchmark on a CUDA device: the A/A run, CUDA graphs beside eager, memory and energy by the driver.

Run with `make test ARGS=tests/gpu`. Where there is no device these are skipped, and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures.engines import LocalBlobs, make_checkpoint

from weighbridge.engines.manifest import Manifest
from weighbridge.registry.schemas import Benchmark
from weighbridge.workers.benchmark import BenchmarkTask, benchmark
from weighbridge.workers.benchmarking.machine import Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine: not run on a GPU"),
]


def test_a_device_is_measured_against_itself(
    tmp_path: Path, make_manifest: Callable[[Path], Manifest], local_blobs: LocalBlobs
) -> None:
    """No difference; eager and CUDA graph are separate rows; memory and device time are the device's."""
    artifact = local_blobs.add(make_manifest(make_checkpoint(tmp_path / "c.safetensors")).canonical())
    task = BenchmarkTask(artifact, artifact, device="cuda", modes=("cuda_graph",))
    outcome = benchmark(task, cache=local_blobs, machine=Machine(tmp_path / "machine"))
    assert outcome.verdict in ("passed", "noisy"), outcome.reason
    seen = Benchmark.model_validate(outcome.facts["benchmark"])
    if seen.status == "valid":
        assert (seen.finding, seen.hardware["device"]) == ("same", "cuda")
        assert {row.mode for row in seen.rows} == {"eager", "cuda_graph"}
        assert seen.environment["memory"]["allocated"] > 0
        assert seen.environment["device_seconds_p50"] > 0
