"""Whether a benchmark's findings can be believed: `python benchmarks/aa.py --runs 20 --hogs 0 2`.

A/A: a twin of the original (the same bytes under another manifest) is measured as every variant is, each time in new
processes; whatever is not "same" is a false finding. onnx: must be "faster", with an interval that the quiet machine's
ratio lies in. Hogs are processes that compute, or copy memory, for as long as the runs beside them take. Keep the
machine free of other work: what else runs there is measured with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))  # variants, which lies beside this file

from rich.console import Console
from rich.table import Table
from variants import CASES, Bench

from weighbridge.engines import hardware
from weighbridge.engines.manifest import Manifest
from weighbridge.registry.recipe import VariantWish
from weighbridge.registry.schemas import Benchmark
from weighbridge.workers.benchmark import BenchmarkTask, benchmark
from weighbridge.workers.benchmarking.machine import Machine
from weighbridge.workers.compress import CompressTask, compress

_WITH_US = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\n"
"""A hog ends with whoever started it, however that ends (PR_SET_PDEATHSIG)."""
HOGS = {
    "compute": f"{_WITH_US}while True: pass",
    "memory": f"{_WITH_US}import numpy as np\na = np.ones(1 << 24, np.float32); b = a.copy()\n"
    "while True: np.copyto(b, a)",
}


@contextmanager
def beside(count: int, kind: str) -> Iterator[None]:
    """With so many hogs at work."""
    running = [subprocess.Popen([sys.executable, "-c", HOGS[kind]]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def contenders(bench: Bench) -> dict[str, str]:
    """Digests of what runs against the original: its twin, and onnx."""
    original = Manifest.model_validate_json(bench.cache(bench.original).read_bytes())
    twin = bench.blobs.put_bytes(original.model_copy(update={"variant": "twin"}).canonical()).digest
    wish = VariantWish.model_validate({"method": "onnx"})
    task = CompressTask(bench.original, wish, bench.case.task, dataset=bench.evaluation, train=bench.train)
    scratch = bench.folder / "scratch"
    scratch.mkdir(exist_ok=True)
    built = compress(task, blobs=bench.blobs, cache=bench.cache, scratch=scratch, progress=lambda share: None)
    if "artifact_digest" not in built.facts:
        raise SystemExit(f"onnx: {built.verdict}: {built.reason}")
    return {"A/A": twin, "onnx": built.facts["artifact_digest"]}


def measure(bench: Bench, artifact: str, *, limit: float, machine: Machine) -> tuple[Benchmark, float]:
    """One whole benchmark, and the seconds that it took."""
    task = BenchmarkTask(
        artifact, bench.original, dataset=bench.evaluation, seconds=bench.seconds, limit=limit, threads=bench.threads
    )
    start = time.monotonic()
    outcome = benchmark(task, cache=bench.cache, machine=machine)
    if "benchmark" not in outcome.facts:
        raise SystemExit(f"{outcome.verdict}: {outcome.reason}")
    return Benchmark.model_validate(outcome.facts["benchmark"]), time.monotonic() - start


def line(where: str, what: str, seen: Sequence[tuple[Benchmark, float]], quiet: float | None) -> list[str]:
    """One row of the table; `quiet` is the ratio that the intervals should hold."""
    rows = [row for row, _ in seen if row.status == "valid"]
    found = Counter(row.finding for row in rows)
    ratios = [row.environment["latency"]["compared"]["ratio"] for row in rows]
    lows, highs = ([getattr(row, name) for row in rows] for name in ("speedup_low", "speedup_high"))
    held = sum(low <= quiet <= high for low, high in zip(lows, highs, strict=True)) if quiet is not None else None
    clocks = Counter(row.environment["latency"]["clock"] for row in rows)
    took = sorted(seconds for _, seconds in seen)
    return [
        where, what, f"{len(seen)}", *(f"{found[name]}" for name in ("same", "faster", "slower")),
        f"{len(seen) - len(rows)}", f"{sum(bool(row.contended) for row in rows)}",
        f"{min(ratios):.3f} {median(ratios):.3f} {max(ratios):.3f}" if rows else "",
        f"{median(lows):.2f}–{median(highs):.2f}" if rows else "", "" if held is None else f"{held}/{len(rows)}",
        " ".join(f"{name} {count}" for name, count in clocks.items()),
        f"{median(took):.1f} {took[-1]:.1f}",
    ]  # fmt: skip


COLUMNS = (
    "beside", "what", "runs", "same", "faster", "slower", "no ratio", "contended", "ratio min, median, max",
    "median interval", "holds the quiet ratio", "clock", "seconds median, max",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Ends with 1 where less than 95% of the A/A runs are "same", or onnx is not faster."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", nargs="?", default="vision", choices=CASES)
    parser.add_argument("--runs", type=int, default=10, help="of A/A, beside each number of hogs")
    parser.add_argument("--onnx-runs", type=int, help="of onnx against the original; else a fifth of --runs")
    parser.add_argument("--hogs", type=int, nargs="*", default=[0, 2], help="numbers of hogs, one after the other")
    parser.add_argument("--kind", choices=HOGS, default="compute", help="what hogs do")
    parser.add_argument("--quiet-ratio", type=float, help="of onnx; else the median of the runs beside no hog")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring on a free machine")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one benchmark takes at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every measurement")
    args = parser.parse_args(argv)
    counts = {"A/A": args.runs, "onnx": max(1, args.runs // 5) if args.onnx_runs is None else args.onnx_runs}
    console = Console(width=200)
    table = Table(*COLUMNS, box=None, title=f"{args.model}; {hardware.describe().label}; {args.threads} thread(s)")
    quiet, good, kept = args.quiet_ratio, True, []
    with tempfile.TemporaryDirectory(prefix="weighbridge-aa-") as folder:
        bench = Bench(CASES[args.model](), Path(folder), device="cpu", threads=args.threads, seconds=args.seconds)
        machine = Machine(Path(folder) / "machine")
        for hogs in args.hogs:
            for what, artifact in contenders(bench).items():
                seen = []
                with beside(hogs, args.kind):
                    for number in range(counts[what]):
                        seen.append(measure(bench, artifact, limit=args.limit, machine=machine))
                        print(f"{hogs} hogs, {what}, run {number + 1}: {_said(*seen[-1])}", file=sys.stderr, flush=True)
                if not seen:
                    continue
                if what == "onnx" and quiet is None and not hogs:
                    quiet = median(row.environment["latency"]["compared"]["ratio"] for row, _ in seen)
                table.add_row(*line(f"{hogs} hogs", what, seen, 1.0 if what == "A/A" else quiet))
                share = sum(row.finding == ("same" if what == "A/A" else "faster") for row, _ in seen) / len(seen)
                good = good and share >= 0.95
                kept += [
                    {"hogs": hogs, "what": what, "seconds": took, **row.model_dump(mode="json")} for row, took in seen
                ]
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))
    return 0 if good else 1


def _said(row: Benchmark, took: float) -> str:
    if row.status != "valid":
        return row.reason
    latency = row.environment["latency"]
    clocks = ", ".join(f"{name} {latency[name]['ratio']:.3f}" for name in ("wall", "cpu") if latency[name])
    interval = f"{row.speedup_low:.3f}–{row.speedup_high:.3f}"
    return (
        f"{row.finding} {interval} by {latency['clock']} ({clocks}), {row.environment['rounds']} rounds, {took:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
