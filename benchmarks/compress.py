"""Streaming compression of one safetensors file against copying it and llm-compressor's `model_free_ptq`.

    python benchmarks/compress.py [--gib 1] [--peer /path/to/python with llmcompressor]

A bf16 file of transformer shapes, page-cached; every row in a fresh process, the rows in turns, the best of the rounds.
Seconds are of the call (imports apart, the kernel's compilation once, apart); no row waits for the disk (no fsync), so
`cp` writes into the page cache too. Peak memory is the whole process's. The load average says how quiet it was.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = Path(__file__).with_name("peer_model_free_ptq.py")
HIDDEN, INNER, VOCABULARY = 2048, 5632, 32_000


def write(path: Path, size: int) -> None:
    """A decoder of about `size` bytes: random bf16 weights, norms, an embedding, in the order of its layers."""
    import torch

    layer = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    layer |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    at, number, header = 2 * VOCABULARY * HIDDEN, 0, {}
    while at < size:
        for name, shape in layer.items():
            shapes[f"model.layers.{number}.{name}.weight"] = shape  # type: ignore[assignment]
            at += 2 * torch.Size(shape).numel()
        number += 1
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write((torch.randn(shape) * 0.02).bfloat16().view(torch.uint8).numpy().data)


def ours(source: Path, out: Path, method: str) -> dict[str, float]:
    """Seconds of one compression in this process, and of getting its kernel."""
    from weighbridge.registry.recipe import VariantWish
    from weighbridge.workers.compression import command, kernels

    start = time.perf_counter()
    note = kernels.pick("BF16")[1]
    kernel, start = time.perf_counter() - start, time.perf_counter()
    command.pack(source, out, VariantWish.model_validate({"method": method}))
    seconds = time.perf_counter() - start
    if note:
        print(note, file=sys.stderr)
    return {"seconds": seconds, "kernel": kernel, "peak": _peak()}


def _peak() -> int:
    """Bytes. (`ru_maxrss` would count what the parent held when it forked.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def copy(source: Path, out: Path) -> dict[str, float]:
    """`cp` of the file."""
    out.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", str(source), str(out / source.name)], check=True)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10}


def in_process(row: str, source: Path, out: Path, peer: str | None) -> dict[str, float]:
    """One row in a process of its own."""
    who, _, method = row.partition(" ")
    command = [sys.executable, __file__, "--row", row, str(source), str(out)]
    if who == "model_free_ptq":
        command = [str(peer), str(PEER), str(source.parent), str(out), method]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{row} failed: {done.stderr[-2000:]}")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {**json.loads(done.stdout.splitlines()[-1]), "size": size}


def measure(folder: Path, rows: list[str], rounds: int, peer: str | None) -> dict[str, list[dict[str, float]]]:
    """Every row in turns; the output of each is removed before the next. The peer, slow as it is, takes two turns."""
    source, seen = folder / "in" / "model.safetensors", {row: [] for row in rows}  # type: ignore[var-annotated]
    for number in range(rounds):
        for row in rows:
            if row.startswith("model_free_ptq") and number >= 2:
                continue
            seen[row].append(in_process(row, source, folder / "out", peer))
            shutil.rmtree(folder / "out")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=["int8-rows", "int4-groups", "fp8-tensors"])
    parser.add_argument("--peer", help="python of an environment with llmcompressor; without it the peer is left out")
    parser.add_argument("--folder", help="where the files go (default: a temporary folder)")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        row, source, out = args.row[0], Path(args.row[1]), Path(args.row[2])
        print(json.dumps(copy(source, out) if row == "cp" else ours(source, out, row.split()[1])))
        return
    rows = ["cp", *(f"weighbridge {method}" for method in args.methods)]
    rows += [f"model_free_ptq {method}" for method in args.methods if method != "fp8-tensors" and args.peer]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        (folder / "in").mkdir()
        source = folder / "in" / "model.safetensors"
        write(source, int(args.gib * (1 << 30)))
        show(source.stat().st_size, measure(folder, rows, args.rounds, args.peer), args.rounds)
    if not args.peer:
        print("model_free_ptq: not measured, no --peer (a venv: pip install llmcompressor)")


def show(size: int, seen: dict[str, list[dict[str, float]]], rounds: int) -> None:
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{os.cpu_count()} CPUs, {size / 1e9:.2f} GB of bf16, page-cached, best of {rounds}, load average {load}")
    print(f"{'row':28} {'GB/s':>6} {'of copy':>8} {'ratio':>6} {'peak MiB':>9} {'kernel s':>9}")
    best = {row: min(one["seconds"] for one in runs) for row, runs in seen.items()}
    for row, runs in seen.items():
        peak = max(one["peak"] for one in runs) / (1 << 20)
        kernel = f"{max(one['kernel'] for one in runs):9.2f}" if "kernel" in runs[0] else ""
        speed, share = size / best[row] / 1e9, best["cp"] / best[row]
        print(f"{row:28} {speed:6.2f} {share:8.2f} {runs[0]['size'] / size:6.3f} {peak:9.0f} {kernel}")


if __name__ == "__main__":
    main()
