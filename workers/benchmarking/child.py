"""The measured process: one artifact, alone. Orders come as lines of JSON on stdin, answers go as lines to stdout.

`python -m weighbridge.workers.benchmarking.child`; it ends with its stdin, or with its parent.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from weighbridge.engines import datatypes, tensors
from weighbridge.engines.blobs import read_manifest
from weighbridge.engines.errors import EngineError, InvalidInput
from weighbridge.engines.load import load
from weighbridge.engines.protocols import Arrays, Session
from weighbridge.workers.benchmarking import scenarios
from weighbridge.workers.benchmarking.scenarios import Samples

_POOL = 16
"""Different inputs that requests take in turns, at least: one alone would be served by branch prediction."""
_POOL_MOST = 256
_POOL_BYTES = 64 << 20
_ROWS = 4096
"""Rows of the real inputs that are kept, at most."""
_PR_SET_PDEATHSIG = 1
_EXHAUSTED = ("out of memory", "can't allocate memory", "bad alloc", "failed to allocate memory")


class Measured:
    """One artifact in this process; every public method is an order, its answer JSON-able."""

    _session: Session

    def start(self, *, engine: str, device: str, threads: int) -> dict[str, Any]:
        """Import the engine and what its first load would import; memory is counted from here."""
        self._torch, self._device = engine == "torch", device
        if self._torch:
            import torch

            from weighbridge.engines.warm import warm

            torch.set_num_threads(threads)
            warm()
        else:
            import onnxruntime  # noqa: F401
        self._base = _resident("VmRSS")
        with suppress(OSError):  # the peak starts again from here
            Path("/proc/self/clear_refs").write_text("5")
        return {"pid": os.getpid()}

    def load(
        self, *, artifact: str, blobs: dict[str, str], factories: list[str], threads: int, dataset: str | None
    ) -> dict[str, Any]:
        """Load and answer once: the cold start, in seconds."""
        whole = read_manifest(_paths(blobs), artifact)
        start = time.perf_counter()
        self._session = load(whole, _paths(blobs), self._device, factories, threads=threads)
        loaded = time.perf_counter()
        # The session of engines that are here already tells the batch only by its inputs.
        free = [spec.shape[:1] == (-1,) for spec in self._session.inputs]
        self._fixed = None if any(free) else self._session.inputs[0].shape[0] if self._session.inputs[0].shape else 1
        self._real = None if dataset is None else _real(self._session, Path(dataset))
        self._pools: dict[int, list[Arrays]] = {}
        pool = self._pool(self._fixed or 1)
        begun = time.perf_counter()
        self._session.infer(pool[0])
        first = time.perf_counter() - begun
        row = sum(array.nbytes for array in pool[0].values())
        inputs = "synthetic" if self._real is None else "real"
        return {"load": loaded - start, "first": first, "fixed": self._fixed, "bytes": row, "inputs": inputs}

    def switch(self, *, mode: str, batch: int) -> dict[str, Any]:
        """Change the mode and run once, which compiles or captures; seconds. Fails as `mode` where there is none."""
        from weighbridge.workers.benchmarking.modes import Modes

        if not hasattr(self, "_modes"):
            self._modes = Modes(self._session, self._device)
        start = time.perf_counter()
        self._modes.switch(mode)
        self._session.infer(self._pool(batch)[0])
        return {"seconds": time.perf_counter() - start}

    def warm(self, *, batch: int, seconds: float) -> dict[str, Any]:
        pool = self._pool(batch)
        return self._quietly(lambda: scenarios.warm(self._session.infer, pool, seconds=seconds))

    def closed(self, *, batch: int, seconds: float, least: int, callers: int) -> dict[str, Any]:
        pool, infer = self._pool(batch), self._session.infer
        return self._quietly(lambda: scenarios.closed(infer, pool, seconds=seconds, least=least, callers=callers))

    def server(self, **order: Any) -> dict[str, Any]:
        """`order`: what `scenarios.server` takes by name."""
        pool, infer = self._pool(self._fixed or 1), self._session.infer
        return self._quietly(lambda: scenarios.server(infer, pool, **order))

    def memory(self) -> dict[str, Any]:
        """Bytes: the peak above the process with its engine imported; on a GPU what torch's allocator had at most."""
        said: dict[str, Any] = {"peak": max(0, _resident("VmHWM") - self._base)}
        if self._torch and self._device.startswith("cuda"):
            import torch

            said |= {
                "allocated": torch.cuda.max_memory_allocated(self._device),
                "reserved": torch.cuda.max_memory_reserved(self._device),
            }
        return said

    def device_time(self, *, batch: int, count: int) -> dict[str, Any]:
        """Median seconds between CUDA events around a request, copies included: what the device itself takes."""
        import torch

        seconds = []
        for _, inputs in zip(range(count), itertools.cycle(self._pool(batch)), strict=False):
            before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            before.record()
            self._session.infer(inputs)
            after.record()
            after.synchronize()
            seconds.append(before.elapsed_time(after) / 1000)
        return {"seconds": float(np.median(seconds))}

    def _quietly(self, run: Callable[[], Samples]) -> dict[str, Any]:
        """Without the garbage collector's pauses; with what the process used meanwhile."""
        gc.collect()
        gc.disable()
        before = resource.getrusage(resource.RUSAGE_SELF)
        try:
            samples = run()
        finally:
            gc.enable()
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return asdict(samples) | {"cpu": cpu, "switches": after.ru_nivcsw - before.ru_nivcsw}

    def _pool(self, batch: int) -> list[Arrays]:
        """Inputs to take in turns: on a GPU more of them than its L2 cache holds, where that is not too many."""
        if batch not in self._pools:
            first = self._inputs(batch, 0)
            size = max(1, sum(array.nbytes for array in first.values()))
            count = min(max(_POOL, 2 * self._cache() // size), _POOL_MOST, max(1, _POOL_BYTES // size))
            self._pools = {batch: [first, *(self._inputs(batch, seed) for seed in range(1, count))]}
        return self._pools[batch]

    def _inputs(self, batch: int, seed: int) -> Arrays:
        if self._real is None:
            return tensors.synthetic(self._session.inputs, size=batch, seed=seed)
        count = len(next(iter(self._real.values())))
        rows = (np.arange(batch) + seed * batch) % count
        return {name: np.ascontiguousarray(array[rows]) for name, array in self._real.items()}

    def _cache(self) -> int:
        """Bytes of the device's L2; 0 on a CPU, whose caches the other process has filled in the meantime."""
        if not (self._torch and self._device.startswith("cuda")):
            return 0
        import torch

        return int(torch.cuda.get_device_properties(self._device).L2_cache_size)


def _real(session: Session, path: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """The inputs of an evaluation set, where they are what the program takes in batches of any size; else None."""
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(path, "np") as file:
            for spec in session.inputs:
                part = file.get_slice(spec.name)
                array = part[: min([_ROWS, *part.get_shape()[:1]])]
                if array.dtype != datatypes.to_numpy(spec.datatype) or spec.shape[:1] != (-1,):
                    return None
                found[spec.name] = array
        tensors.check_inputs(found, session.inputs)
    except (SafetensorError, InvalidInput, OSError):
        return None
    return found


def _paths(blobs: dict[str, str]) -> Callable[[str], Path]:
    def path(digest: str) -> Path:
        return Path(blobs[digest])  # KeyError is a LookupError

    return path


def _resident(field: str) -> int:
    """Bytes, by a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _failure(exc: Exception) -> dict[str, str]:
    """What kind of failure it is: `memory`, `mode`, `input`, or `engine`."""
    text = f"{exc or type(exc).__name__}"
    if isinstance(exc, MemoryError) or any(sign in text.lower() for sign in _EXHAUSTED):
        return {"failed": "memory", "reason": text}
    kind = "input" if isinstance(exc, InvalidInput) else "mode" if type(exc).__name__ == "ModeUnavailable" else "engine"
    named = text if isinstance(exc, EngineError) or kind == "mode" else f"{type(exc).__name__}: {text}"
    return {"failed": kind, "reason": named}


def main() -> None:
    """Serve orders until stdin ends. What programs print goes to stderr, never between the answers."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    measured = Measured()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"ok": getattr(measured, order.pop("do"))(**order)}
        except Exception as exc:
            answer = _failure(exc)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
