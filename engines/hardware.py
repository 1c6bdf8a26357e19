"""What a machine is, as far as a benchmark depends on it: the fingerprint that measurements and choices are keyed by.

Imports neither torch nor onnxruntime: their versions are read from what is installed, a GPU is asked through NVML.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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
    raise NotImplementedError
