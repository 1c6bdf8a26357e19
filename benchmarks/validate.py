"""Validate's one pass (digest + finiteness + statistics) against bare read and BLAKE3: `python benchmarks/validate.py`.

Page-cached file, every row in a fresh process, the best of N rounds interleaved; memory is the peak above the process
before the pass (torch imported).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = ("read", "read + BLAKE3", "read + BLAKE3 + inspect", "the same, copied into a blob")


def write(path: Path, dtype: str, size: int) -> None:
    """A checkpoint of `size` bytes in tensors of 64 MiB, random values."""
    import torch

    from weighbridge.engines import datatypes

    torch_dtype = datatypes.to_torch(datatypes.from_safetensors(dtype))
    block = 64 << 20
    data = torch.randn(block // torch_dtype.itemsize).to(torch_dtype).view(torch.uint8).numpy().tobytes()
    header = {
        f"layer{i}.weight": {
            "dtype": dtype,
            "shape": [block // torch_dtype.itemsize],
            "data_offsets": [i * block, (i + 1) * block],
        }
        for i in range(size // block)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in header:
            file.write(data)


def measure(case: int, path: Path) -> dict[str, float]:
    """Seconds of one pass, and MiB of peak memory above the start."""
    import torch

    from weighbridge.engines.stream import Inspector
    from weighbridge.storage.blobs import Blobs
    from weighbridge.storage.pins import pin
    from weighbridge.storage.safetensors_header import read_header
    from weighbridge.storage.streaming import DigestingReader, chunks
    from weighbridge.storage.urls import open_store

    torch.set_num_threads(1)
    store = open_store(path.parent.as_uri())
    ref = pin(store.head(path.name))
    header = read_header(store, ref)
    before, start = _resident(), time.perf_counter()
    with store.open(path.name, if_match=ref) as stream, Inspector(stream, header) as inspector:
        if case == 3:
            Blobs(store, "out").put_stream(inspector, expected=ref.size)  # type: ignore[arg-type]
        else:
            reader = (stream, DigestingReader(stream), DigestingReader(inspector))[case]  # type: ignore[arg-type]
            for _ in chunks(reader):  # type: ignore[arg-type]
                pass
        if case >= 2:
            inspector.stats()
    return {"seconds": time.perf_counter() - start, "memory": _peak() - before}


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _resident() -> float:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["F32", "BF16"])
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(int(args.case[0]), Path(args.case[1]))))
        return
    print(f"{os.cpu_count()} CPUs, {args.mib} MiB, best of {args.rounds}")
    print(f"{'dtype':6} {'pass':30} {'GB/s':>6} {'MiB above start':>16}")
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            write(path, dtype, args.mib << 20)
            seen: dict[int, list[dict[str, float]]] = {}
            for _ in range(args.rounds):
                for case in range(len(CASES)):
                    command = [sys.executable, __file__, "--case", str(case), str(path)]
                    result = subprocess.run(command, check=True, capture_output=True, text=True)
                    seen.setdefault(case, []).append(json.loads(result.stdout))
            for case, name in enumerate(CASES):
                best = min(one["seconds"] for one in seen[case])
                memory = max(one["memory"] for one in seen[case])
                print(f"{dtype:6} {name:30} {(args.mib << 20) / best / 1e9:6.2f} {memory:16.0f}")


if __name__ == "__main__":
    main()
