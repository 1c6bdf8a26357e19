"""What a machine is: the same kind for equal machines, limits of its cgroups, a GPU by NVML, and what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weighbridge.engines import hardware
from weighbridge.engines.hardware import NoSuchDevice, cpu_quota, describe, memory_limit


def test_this_machine_is_the_same_kind_every_time() -> None:
    """A measurement of today holds tomorrow; the label is readable."""
    seen = describe()
    assert seen == describe("cpu")
    assert len(seen.kind) == 16
    assert (seen.device, seen.memory_gib & (seen.memory_gib - 1)) == ("cpu", 0)
    assert 1 <= seen.cores <= len(os.sched_getaffinity(0))
    assert seen.engines["torch"].count(".") == 1
    assert seen.name in seen.label
    assert f"torch {seen.engines['torch']}" in seen.label


def test_another_engine_or_fewer_processors_are_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels differ between minor versions, so their measurements are kept apart; a little memory changes nothing."""
    here = hardware._hardware("cpu", "X", 32, 25 << 30, "avx2", 4)
    assert here.kind == hardware._hardware("cpu", "X", 32, 26 << 30, "avx2", 4).kind
    assert here.kind != hardware._hardware("cpu", "X", 32, 25 << 30, "avx2", 2).kind
    monkeypatch.setattr(hardware, "_engines", lambda: {"torch": "2.99"})
    assert here.kind != hardware._hardware("cpu", "X", 32, 25 << 30, "avx2", 4).kind


def test_processors_are_named_by_what_kernels_choose_by() -> None:
    """x86 flags, or ARM's features, in one order; nothing else."""
    x86 = "model name\t: Some  CPU\nflags\t\t: fpu avx512_vnni avx2 avx512f\n\nmodel name\t: Some  CPU\n"
    assert hardware._processor(x86) == ("Some CPU", ["avx2", "avx512f", "avx512_vnni"])
    name, sets = hardware._processor("Features\t: fp asimd i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n")
    assert name.endswith("0x41 0xd40")
    assert sets == ["asimd", "i8mm"]


@pytest.mark.parametrize(
    ("own", "files", "quota", "memory"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000", "a/memory.max": "1024"}, 1.5, 1024),
        (
            "4:memory:/j\n1:cpu,cpuacct:/j\n",
            {
                "cpu/j/cpu.cfs_quota_us": "300000",
                "cpu/j/cpu.cfs_period_us": "100000",
                "memory/j/memory.limit_in_bytes": "2048",
            },
            3.0,
            2048,
        ),
        ("0::/seen/from/outside\n", {"cpu.max": "50000 100000", "memory.max": "max"}, 0.5, None),
        ("", {}, None, None),
    ],
)
def test_cgroup_limits_count(
    tmp_path: Path, own: str, files: dict[str, str], quota: float | None, memory: int | None
) -> None:
    """The smallest limit of a container and all around it, versions 1 and 2; a container sees itself as the root."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    assert cpu_quota(tmp_path, tmp_path / "own") == quota
    assert memory_limit(tmp_path, tmp_path / "own") == memory


def test_a_device_that_is_not_here_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pynvml, or a name that nobody knows."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoSuchDevice, match="install nvidia-ml-py"):
        describe("cuda")
    with pytest.raises(NoSuchDevice, match="'tpu' is none that is known"):
        describe("tpu")


class _Nvml(SimpleNamespace):
    """What NVML says on a machine with two devices: a stand-in, since there is none here."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        pass

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"Device {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=(80 << 30) - 5)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)


def test_a_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through CUDA_VISIBLE_DEVICES, which renumbers what NVML does not."""
    monkeypatch.setitem(sys.modules, "pynvml", _Nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = describe("cuda")
    assert (seen.device, seen.name, seen.memory_gib, seen.capability, seen.cores) == ("cuda", "Device 0", 80, "9.0", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert describe("cuda").name == "Device 1"
    with pytest.raises(NoSuchDevice, match="cuda:1 is none of them"):
        describe("cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(NoSuchDevice, match="no CUDA device 0 on this machine"):
        describe("cuda")


def test_describing_imports_no_engine() -> None:
    """The daemon and a registry's command line can ask too."""
    code = "import sys; from weighbridge.engines.hardware import describe; describe(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
