"""How much memory a call takes, and how much this process may: the kernel's own counts, or the device's."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_WORDS = ("can't allocate memory", "out of memory", "failed to allocate", "bad_alloc", "bad allocation")
"""How torch, CUDA and onnxruntime say that memory is short; they have no common exception."""


class Meter:
    """Measures on `device`: the process's peak resident memory, or what torch allocates on a CUDA device."""

    def __init__(self, device: str = "cpu") -> None:
        self.on_device = self._cuda = device.startswith("cuda")

    def room(self, wanted: int) -> int:
        """`wanted` bytes, or half of what the device has free where that is less."""
        if not self._cuda:
            return wanted
        free, _ = sys.modules["torch"].cuda.mem_get_info()
        return min(wanted, int(free) // 2)

    def of(self, call: Callable[[], T]) -> tuple[T, int, float]:
        """(what the call gives, bytes that memory grew by at its peak, seconds that it computed).

        On a processor never more seconds than this process had of it: what others had in between is no work of the
        call's, and a price is kept as long as the version is loaded.
        """
        before = self._begin()
        began, computed = time.perf_counter(), time.process_time()
        result = call()
        seconds, computed = time.perf_counter() - began, time.process_time() - computed
        return result, max(0, self._peak() - before), seconds if self._cuda else min(seconds, computed)

    def _begin(self) -> int:
        if self._cuda:
            torch = sys.modules["torch"]
            torch.cuda.reset_peak_memory_stats()
            return int(torch.cuda.memory_allocated())
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide as much growth
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # the peak begins anew; where that is not allowed, only new peaks are seen
        return _kilobytes("VmRSS") << 10

    def _peak(self) -> int:
        if self._cuda:
            return int(sys.modules["torch"].cuda.max_memory_allocated())
        return _kilobytes("VmHWM") << 10


def limit(more: int) -> None:
    """Let this process take `more` bytes than now: beyond, an allocation fails, and the kernel kills nobody.

    Counts private writable memory (RLIMIT_DATA). Not for a process that uses CUDA, which maps more than it takes.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = (_kilobytes("VmData") << 10) + more
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that memory is short."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def machine_bytes() -> int:
    """Memory that this machine, or the control group that this process is in, has."""
    with Path("/proc/meminfo").open() as lines:
        total = int(next(lines).split()[1]) << 10
    return min([total, *_group_limits()])


def _group_limits() -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root, name = (
                    (Path("/sys/fs/cgroup"), "memory.max")
                    if not controllers
                    else (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes")
                )
                here = root / path.lstrip("/")
                for folder in (here, *here.parents):
                    with contextlib.suppress(OSError, ValueError):  # "max" is no number
                        found.append(int((folder / name).read_text()))
                    if folder == root:
                        break
    return found


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0
