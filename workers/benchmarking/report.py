"""A benchmark as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from weighbridge import terminal
from weighbridge.registry.schemas import Benchmark, BenchmarkRow

_COLUMNS = ("scenario", "mode", "batch", "callers", "rate/s", "p50 ms", "p99 ms", "rows/s", "× original", "finding")


def show(benchmarks: Sequence[Benchmark]) -> None:
    """Print each as one table on stdout."""
    for one in benchmarks:
        title = f"{one.artifact_digest[:12]} on {one.hardware.get('label', one.kind)}: {one.status}"
        terminal.draw(_COLUMNS, map(_cells, one.rows), title=title, right=_COLUMNS[2:])
        terminal.lines(_lines(one))


def _cells(row: BenchmarkRow) -> list[str]:
    rate = "" if row.rate is None else f"{row.rate:,.0f}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    times = [f"{seconds * 1000:.3f}" for seconds in (row.p50, row.p99)]
    head = [row.scenario, row.mode, f"{row.batch}", f"{row.concurrency}", rate]
    return [*head, *times, f"{row.throughput:,.0f}", ratio, row.finding]


def _lines(one: Benchmark) -> list[str]:
    """What belongs to no row."""
    spread = "" if one.spread is None else f"A/A spread {one.spread:.1%}, "
    cold = f"load and first answer {one.load_seconds or 0:.2f} s, peak memory {(one.memory or 0) / 1e6:.1f} MB"
    lines = [spread + cold]
    if one.energy is not None:
        lines.append(f"{one.energy * 1000:.3g} mJ a row above idle")
    return [*lines, *one.environment.get("notes", []), *([one.reason] if one.reason else [])]
