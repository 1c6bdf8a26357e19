"""Compressing files that no process may hold: memory stays flat while the file grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_MEASURE = """
import json, sys
from pathlib import Path
from weighbridge.registry.recipe import VariantWish
from weighbridge.workers.compression import command, kernels
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
kernels.pick("BF16")
before = peak()
made = command.pack(Path(sys.argv[1]), Path(sys.argv[2]), VariantWish(method=sys.argv[3]))
print(json.dumps({"above": peak() - before, "peak": peak(), "bytes_out": made["bytes_out"]}))
"""


def sparse(path: Path, shape: tuple[int, int]) -> int:
    """One bf16 tensor of zeros that takes no room on the disk; its bytes."""
    size = 2 * shape[0] * shape[1]
    header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return size


def measure(source: Path, out: Path, method: str) -> dict[str, int]:
    command = [sys.executable, "-c", _MEASURE, str(source), str(out), method]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    return dict(json.loads(done.stdout))


def test_one_tensor_of_more_than_a_gigabyte_takes_the_memory_of_a_few_blocks(tmp_path: Path) -> None:
    """The peak is under 1 GB, torch included, and nearly all of it was there before the work began."""
    size = sparse(tmp_path / "model.safetensors", (80_000, 8192))
    assert size > 1.2e9
    seen = measure(tmp_path / "model.safetensors", tmp_path / "out", "int8-rows")
    assert seen["peak"] < 1 << 30
    assert seen["above"] < 64 << 20
    assert seen["bytes_out"] < 0.51 * size
