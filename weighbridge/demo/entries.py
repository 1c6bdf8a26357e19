"""A variant as the demo sees it: its verdict, its size, its speed beside the original's, in a row or a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from weighbridge import terminal
from weighbridge.cli.output import cell
from weighbridge.registry.schemas import Variant, VariantBenchmark

ORIGINAL = "original"


@dataclass
class Entry:
    """One variant as it stands. `share`: its bytes beside the original's; `kept`: of the original's accuracy."""

    model: str
    variant: str
    expected: str
    status: str = ""
    reason: str = ""
    size: int = 0
    share: float | None = None
    kept: float | None = None
    p50: float | None = None
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    """Of the speedup."""
    finding: str = ""
    contended: str = ""
    """What else ran when it was measured: then the ratio counts, and p50 does not."""
    spoilt: str = ""
    """Why its last benchmark is no fact."""
    doing: str = ""
    """What a worker does with it now."""
    gates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """The verdict is the right one; a rejected one was refused by a gate that says its numbers."""
        refused = any(gate["verdict"] == "failed" and gate["observed"] is not None for gate in self.gates)
        return self.status == self.expected and (self.status != "rejected" or refused)

    def line(self) -> str:
        p50 = "" if self.p50 is None else f"p50 {self.p50 * 1e3:.3f} ms"
        beside = self.contended and f"beside other work ({self.contended})"
        speed = " ".join(filter(None, (", ".join(filter(None, (self.times, p50))), beside)))
        parts = [part for part in (self.reason, speed, self.spoilt) if part]
        return f"{self.model} {self.variant}: {self.status}" + (f": {'; '.join(parts)}" if parts else "")

    @property
    def times(self) -> str:
        if self.variant == ORIGINAL or self.speedup is None:
            return ""
        ratio = "as fast" if self.finding == "same" else f"{self.speedup:.2f} ×"
        return ratio if self.interval is None else f"{ratio} ({self.interval[0]:.2f}–{self.interval[1]:.2f})"


def table(entries: Iterable[Entry], *, wide: bool = True) -> Table:
    """The whole picture; `wide` says the reasons too."""
    columns = ["", "model", "variant", "status", "bytes", "of original", "kept", "p50 ms", "×"]
    columns += ["reason"] if wide else []
    return terminal.grid(columns, [list(map(cell, _cells(entry)))[: len(columns)] for entry in entries])


def _cells(entry: Entry) -> Iterator[str]:
    ended = entry.status not in ("", "pending")
    yield "" if not ended else "✓" if entry.right else "✗"
    yield from (entry.model, entry.variant, entry.status)
    yield f"{entry.size:,}" if entry.size else ""
    yield f"{entry.share:.0%}" if entry.share is not None else ""
    yield f"{entry.kept:.1%}" if entry.kept is not None else ""
    yield f"{entry.p50 * 1e3:.3f}{' (contended)' * bool(entry.contended)}" if entry.p50 is not None else ""
    yield entry.times
    yield "; ".join(part for part in (entry.doing, entry.reason, entry.spoilt) if part)


def fill(entry: Entry, variant: Variant, seen: VariantBenchmark | None, original: int) -> bool:
    """Bring the entry up to date; return whether it is worth a line."""
    before = (entry.status, entry.p50, entry.spoilt)
    entry.status, entry.reason, entry.size = variant.status, variant.reason, variant.size
    entry.share = variant.size / original if variant.size and original else None
    entry.kept = next((metric.value for metric in variant.metrics if metric.name == "kept"), None)
    entry.gates = [gate.model_dump() for gate in variant.gates]
    entry.doing = ", ".join(f"{job.stage} {job.progress:.0%}" for job in variant.jobs if job.state == "running")
    if seen is not None:
        entry.p50, entry.speedup, entry.finding = seen.p50, seen.speedup, seen.finding
        low, high = seen.speedup_low, seen.speedup_high
        entry.interval = None if low is None or high is None else (low, high)
        entry.contended = seen.contended
        entry.spoilt = "" if seen.status == "valid" else f"not measured yet: {seen.reason}"
    return (entry.status, entry.p50, entry.spoilt) != before
