"""What a machine is, as far as a benchmark depends on it: the fingerprint that measurements and choices are keyed by.

Imports neither torch nor onnxruntime: their versions are read from what is installed, a GPU is asked through NVML.
"""

from __future__ import annotations

import json
import math
import os
import platform
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

_SETS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""The instruction sets that oneDNN's, torch's and onnxruntime's kernels choose by, on x86 and on ARM."""
_ENGINES = {"torch": ("torch",), "torchao": ("torchao",), "onnxruntime": ("onnxruntime", "onnxruntime-gpu")}
"""Each engine's distributions; the first that is installed counts."""
_UNLIMITED = 1 << 60
"""A cgroup's memory limit from here on means none."""


class NoSuchDevice(RuntimeError):
    """The device that was asked for is not on this machine."""


class Hardware(BaseModel):
    """One kind of device. Equal `kind` means that a measurement of one holds for the other."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: str
    """16 hex digits: a digest of the fields below but `label` and `memory_bytes`."""
    label: str
    """For people: `2 × Intel Xeon … AVX512-VNNI, 24 GiB, torch 2.13, onnxruntime 1.32`."""
    device: str
    """cpu or cuda."""
    name: str
    """The device's model."""
    memory_gib: int
    """Rounded up to a power of two on a CPU, where equal machines differ by a little."""
    memory_bytes: int
    capability: str
    """The instruction sets that kernels choose by, or CUDA's compute capability (`9.0`)."""
    cores: int
    """Processors that this process may use; 0 on a GPU."""
    engines: dict[str, str]
    """{"torch": "2.13", "torchao": "0.18", "onnxruntime": "1.32"}: what is installed, minor versions."""


def describe(device: str = "cpu") -> Hardware:
    """Describe `cpu`, `cuda` or `cuda:1` of this machine. Raises NoSuchDevice."""
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return _cpu()
    if kind == "cuda" and (not index or index.isdigit()):
        return _cuda(int(index or 0))
    raise NoSuchDevice(f"device {device!r} is none that is known; give cpu, cuda or cuda:N")


def _cpu() -> Hardware:
    name, sets = _processor(Path("/proc/cpuinfo").read_text())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = min(total, memory_limit() or total)
    cores = _cores(len(os.sched_getaffinity(0)), cpu_quota())
    return _hardware("cpu", name, _power_of_two(memory), memory, " ".join(sets), cores)


def _cuda(index: int) -> Hardware:
    nvml = open_nvml()
    try:
        handle = device_handle(nvml, index)
        name, memory = nvml.nvmlDeviceGetName(handle), int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    except nvml.NVMLError as exc:
        raise NoSuchDevice(f"there is no CUDA device {index} on this machine: {exc}") from exc
    finally:
        nvml.nvmlShutdown()
    text = name.decode() if isinstance(name, bytes) else str(name)
    return _hardware("cuda", text, math.ceil(memory / (1 << 30)), memory, f"{major}.{minor}", 0)


def open_nvml() -> Any:
    """The `pynvml` module, initialised; the caller shuts it down. Raises NoSuchDevice saying what is missing."""
    try:
        nvml = import_module("pynvml")
    except ImportError as exc:
        raise NoSuchDevice("there is no pynvml to ask for CUDA devices; install nvidia-ml-py") from exc
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as exc:
        raise NoSuchDevice(f"NVML finds no NVIDIA driver on this machine: {exc}") from exc
    return nvml


def device_handle(nvml: Any, index: int) -> Any:
    """NVML's handle of the device that CUDA calls `index`: CUDA_VISIBLE_DEVICES renumbers, NVML does not.

    Raises NVMLError, NoSuchDevice.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if index >= len(names):
        raise NoSuchDevice(f"CUDA_VISIBLE_DEVICES={visible} shows {len(names)} devices, cuda:{index} is none of them")
    name = names[index]
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)


def _hardware(device: str, name: str, gib: int, memory: int, capability: str, cores: int) -> Hardware:
    engines = _engines()
    fields = {"device": device, "name": name, "memory_gib": gib, "capability": capability, "cores": cores}
    key = json.dumps(fields | {"engines": engines}, sort_keys=True, separators=(",", ":"))
    shown = [f"{cores} × {name}" if cores else name, _shown(device, capability)]
    shown.append(f"{math.ceil(memory / (1 << 30))} GiB")
    shown += [f"{engine} {version}" for engine, version in engines.items()]
    return Hardware(
        kind=blake3(key.encode()).hexdigest(length=8),
        label=", ".join(part for part in shown if part),
        memory_bytes=memory,
        engines=engines,
        **fields,
    )


def _shown(device: str, capability: str) -> str:
    """The strongest instruction set of each family is enough for people."""
    if device == "cuda":
        return f"compute capability {capability}"
    return "-".join(part.upper() for part in capability.split()[-2:])


def _processor(cpuinfo: str) -> tuple[str, list[str]]:
    """The model's name and the instruction sets, in the order of `_SETS`; ARM names no model, only its parts."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    parts = [fields[key] for key in ("CPU implementer", "CPU part") if key in fields]
    name = fields.get("model name") or " ".join([platform.machine(), *parts])
    return " ".join(name.split()), [one for one in _SETS if one in flags]


def _engines() -> dict[str, str]:
    found = {}
    for engine, distributions in _ENGINES.items():
        for distribution in distributions:
            with suppress(metadata.PackageNotFoundError):
                found[engine] = ".".join(metadata.version(distribution).split("+")[0].split(".")[:2])
                break
    return found


def _cores(affinity: int, quota: float | None) -> int:
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def _power_of_two(memory: int) -> int:
    """GiB, rounded up."""
    gib = math.ceil(memory / (1 << 30))
    return 1 << (gib - 1).bit_length()


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors that the cgroups of this process may use at once, None without a limit; version 1 and 2."""
    shares = []
    for text in _settings(root, own, "cpu", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota != "max":
            shares.append(int(quota) / int(period or 100_000))
    for quota, period in zip(
        _settings(root, own, "cpu", "cpu.cfs_quota_us"), _settings(root, own, "cpu", "cpu.cfs_period_us"), strict=False
    ):
        if int(quota) > 0:
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the cgroups of this process may hold, None without a limit; version 1 and 2."""
    texts = [*_settings(root, own, "memory", "memory.max"), *_settings(root, own, "memory", "memory.limit_in_bytes")]
    return min((int(text) for text in texts if text != "max" and int(text) < _UNLIMITED), default=None)


def _settings(root: Path, own: Path, controller: str, file: str) -> list[str]:
    """One file's text in the cgroup of this process and in all above it.

    A container sees its own cgroup as the root, but reads its path from outside: what is not there is left out.
    """
    found = []
    for line in own.read_text().splitlines() if own.exists() else ():
        number, controllers, path = line.split(":", 2)
        mount = root if number == "0" else root / controller
        if number != "0" and controller not in controllers.split(","):
            continue
        here = mount / path.lstrip("/")
        for folder in (here, *here.parents):
            with suppress(OSError):
                found.append((folder / file).read_text().strip())
            if folder == mount:
                break
    return found
