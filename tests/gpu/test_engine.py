"""The torch engine on a CUDA device: the same artifact, the same answers, the same golden as on the CPU.

Run with `make test ARGS=tests/gpu`. Where there is no device these are skipped, and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.engines import LocalBlobs, make_checkpoint

from weighbridge.engines import golden
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine: not run on a GPU"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 1e-4), ("F16", 2e-2), ("BF16", 6e-2)])
def test_a_device_answers_as_the_cpu(
    tmp_path: Path, make_manifest: Callable[[Path], Manifest], local_blobs: LocalBlobs, dtype: str, tolerance: float
) -> None:
    """A template that was exported on the CPU is moved with its constants, and answers alike at every batch size."""
    manifest = make_manifest(make_checkpoint(tmp_path / "c.safetensors", dtype=dtype))
    host, device = load(manifest, local_blobs), load(manifest, local_blobs, "cuda")
    for size in (1, 2, 65):
        pixels = {"pixels": np.random.default_rng(size).standard_normal((size, 64)).astype(np.float32)}
        seen, expected = device.infer(pixels)["logits"], host.infer(pixels)["logits"]
        np.testing.assert_allclose(seen, expected, rtol=tolerance, atol=tolerance)
    host.close()
    device.close()


def test_the_reference_golden_of_the_cpu_holds_on_a_device(
    tmp_path: Path, make_manifest: Callable[[Path], Manifest], local_blobs: LocalBlobs
) -> None:
    """What validation recorded on a machine without a GPU is what a GPU host proves itself by."""
    manifest = make_manifest(make_checkpoint(tmp_path / "c.safetensors"))
    host, device = load(manifest, local_blobs), load(manifest, local_blobs, "cuda")
    golden.check(device, golden.make_reference(host), *golden.tolerance(["F32"]))
    host.close()
    device.close()
