"""A CUDA device as NVML sees it while something is measured on it: processes, clocks, memory, energy."""

from __future__ import annotations

import time
from typing import Any

from weighbridge.engines.hardware import device_handle, open_nvml

_SLOWED = {
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "heat",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "heat, by the hardware",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}
"""A power cap is not among them: it is how the device runs under full load, always."""
IDLE_SECONDS = 1.0


class Gpu:
    """One device. Opened for the length of a benchmark."""

    def __init__(self, device: str) -> None:
        """Raises NoSuchDevice."""
        self._nvml: Any = open_nvml()
        self._handle = device_handle(self._nvml, int(device.partition(":")[2] or 0))

    def processes(self) -> int:
        """How many have a context. By count: inside a container the ids are another namespace's."""
        return len(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))

    def throttled(self) -> str:
        reasons = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        return ", ".join(text for name, text in _SLOWED.items() if reasons & getattr(self._nvml, name))

    def memory(self, pid: int) -> int | None:
        """Bytes that a process holds on the device; None where NVML does not tell (another pid namespace)."""
        for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == pid and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None

    def clocks(self) -> dict[str, int]:
        """MHz."""
        nvml = self._nvml
        kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        return {name: int(nvml.nvmlDeviceGetClockInfo(self._handle, kind)) for name, kind in kinds.items()}

    def joules(self) -> float | None:
        """Since the driver was loaded; None on devices that do not count (before Volta)."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except self._nvml.NVMLError:
            return None

    def idle_watts(self) -> float | None:
        """Measured now, for a second in which nothing of ours runs."""
        before = self.joules()
        time.sleep(IDLE_SECONDS)
        after = self.joules()
        return None if before is None or after is None else (after - before) / IDLE_SECONDS

    def close(self) -> None:
        self._nvml.nvmlShutdown()
