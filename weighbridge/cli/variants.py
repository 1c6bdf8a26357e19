"""Variants: what was built of a version, how good and how fast each is, and which kind of host gets which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weighbridge.cli import output, session
from weighbridge.cli.versions import ModelName, Selector

if TYPE_CHECKING:
    from weighbridge.registry.client import Client
    from weighbridge.registry.schemas import Choice, Variant, VariantBenchmark, VersionDetail

PANEL = "Models"


def register(app: typer.Typer) -> None:
    for command in (variants, workers):
        app.command(rich_help_panel=PANEL)(command)


def variants(
    context: typer.Context,
    model: ModelName,
    version: Selector = "latest",
    tensors: Annotated[
        str | None, typer.Option("--tensors", metavar="VARIANT", help="What became of every tensor of this variant.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until all are built, judged and measured.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Longest wait (s).")] = None,
    json: session.Json = False,
) -> None:
    """Show a version's variants: verdicts, sizes, speeds, and which kind of host gets which.

    Examples: weighbridge variants digits champion; weighbridge variants digits 3 --tensors int8-dynamic
    """
    with session.of(context).client() as client:
        if tensors is not None:
            _show_tensors(client, model, version, tensors, json=json)
            return
        found = client.wait_variants(model, version, timeout=timeout) if wait else client.version(model, version)
        measured = client.benchmarks(model, found.number)
        choices = client.choices(model, found.number) if found.status == "ready" else []
    if json:
        output.emit({"version": found, "benchmarks": measured, "choices": choices})
        return
    _show(found, measured, choices)


def workers(context: typer.Context, json: session.Json = False) -> None:
    """List the workers that build and measure variants, with their devices.

    Example: weighbridge workers --json
    """
    with session.of(context).client() as client:
        found = client.workers()
    if json:
        output.emit(found)
        return
    rows = ((w.owner, w.kind, w.hardware.get("label", ""), ", ".join(w.queues), w.seen_at) for w in found)
    output.table(("worker", "kind", "hardware", "queues", "seen"), rows, empty="no worker takes variants' work")


def _show_tensors(client: Client, model: str, version: int | str, variant: str, *, json: bool) -> None:
    found = client.tensors(model, version, variant)
    if json:
        output.emit(found)
        return
    rows = (
        (t.name, t.action, output.size(t.bytes_in), output.size(t.bytes_out), _round(t.sqnr, 1), t.reason)
        for t in found
    )
    output.table(("tensor", "action", "before", "after", "SQNR dB", "reason"), rows, empty="no tensors are recorded")


def _show(v: VersionDetail, measured: Sequence[VariantBenchmark], choices: Sequence[Choice]) -> None:
    original = next((x.size for x in v.variants if x.name == "original"), 0) or v.size
    output.table(
        ("variant", "status", "size", "of original", "kept", "reason"),
        ((x.name, x.status, output.size(x.size or None), _share(x, original), _kept(x), x.reason) for x in v.variants),
        title=f"{v.model} {v.number}",
        empty="no variants",
    )
    if rows := list(_speeds(measured)):
        output.console().print()
        columns = ("variant", "p50 ms", "p99 ms", "latency ×", "rows/s", "throughput ×", "memory", "hardware")
        output.table(columns, rows, title="Measured")
    if busy := _beside(measured):
        output.line(f"* measured beside other work ({busy}): only the ratios and the memory are facts")
    if open_ := list(_unshown(measured)):
        output.console().print()
        output.table(("variant", "what could not be shown"), open_, title="Open")
    if choices:
        output.console().print()
        rows = [(c.label or c.kind or "every other kind", c.variant, c.reason) for c in choices]
        output.table(("hosts", "get", "because"), rows, title="Choice")
    if not v.variants_settled:
        output.note("not settled: more is to come (`--wait` waits for it)")


def _speeds(measured: Sequence[VariantBenchmark]) -> Iterator[tuple[Any, ...]]:
    """The newest fact of each variant and kind."""
    seen: set[tuple[str, str]] = set()
    for m in measured:
        if m.status != "valid" or (m.variant, m.kind) in seen:
            continue
        seen.add((m.variant, m.kind))
        mark = "*" if m.contended else ""
        faster = "same" if m.finding == "same" else _round(m.speedup, 2)
        yield (
            m.variant,
            _round(m.p50, 3, 1e3) + mark,
            _round(m.p99, 3, 1e3) + mark,
            faster + _interval(m.speedup_low, m.speedup_high),
            _round(m.throughput, 0) + mark,
            _round(m.throughput_ratio, 2) + _interval(m.throughput_low, m.throughput_high),
            output.size(m.memory),
            m.hardware.get("label", m.kind),
        )


def _beside(measured: Sequence[VariantBenchmark]) -> str:
    """What took the machine from the newest fact that is marked; empty where none is."""
    facts = {(m.variant, m.kind): m for m in reversed(measured) if m.status == "valid"}
    return next((m.contended for m in facts.values() if m.contended), "")


def _unshown(measured: Sequence[VariantBenchmark]) -> Iterator[tuple[str, str]]:
    """Of the newest try of each variant and kind: why, when the next one is, and how to ask for it."""
    newest = {(m.variant, m.kind): m for m in reversed(measured)}
    yield from ((m.variant, m.reason) for m in newest.values() if m.reason)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"


def _share(variant: Variant, original: int) -> str:
    return f"{variant.size / original:.0%}" if variant.size and original else ""


def _kept(variant: Variant) -> str:
    return next((f"{m.value:.2%}" for m in variant.metrics if m.name == "kept"), "")


def _round(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}"
