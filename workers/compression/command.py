"""`python -m weighbridge.workers.compression.streaming`: pack any safetensors file or folder, without a registry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress as Bar

from weighbridge import terminal
from weighbridge.engines import packed
from weighbridge.registry.recipe import VariantWish
from weighbridge.registry.schemas import VariantTensor
from weighbridge.storage import names
from weighbridge.workers.compression import streaming
from weighbridge.workers.compression.packing import Plan, plan
from weighbridge.workers.compression.types import BuildFailed, NotApplicable, Progress

PROGRAM = "weighbridge.workers.compression.streaming"
Streamed = StrEnum("Streamed", {name: name for name in packed.SCHEMES})  # type: ignore[misc]


def app() -> typer.Typer:
    """The command line."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command(cls=terminal.Command)(main)
    return command


def main(
    source: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder of them.", exists=True)],
    method: Annotated[Streamed, typer.Option(help="How to pack.")],
    out: Annotated[Path, typer.Option(help="Folder of the new files; none of them may exist.")],
    group: Annotated[int, typer.Option(help="Weights that share a scale, for *-groups.", min=2, max=65536)] = 32,
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of layers to keep; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Pack weights and say what became of each tensor."""
    wish = VariantWish.model_validate({"method": method.value, "group": group, "skip": tuple(skip or ())})
    console = terminal.console(stderr=True)
    try:
        with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"{method.value}", total=1.0)
            report = pack(source, out, wish, progress=lambda done: bar.update(task, completed=done))
    except (NotApplicable, BuildFailed, OSError) as exc:
        terminal.error(PROGRAM, f"{source}: {exc}")
        raise typer.Exit(1) from exc
    if as_json:
        print(json.dumps(report, default=lambda row: row.model_dump(), indent=2))
    else:
        _show(report)


def _show(report: Mapping[str, object]) -> None:
    rows = report["tensors"]
    assert isinstance(rows, list)
    cells = (
        (row.name, row.action, row.reason, f"{row.bytes_in:,}", f"{row.bytes_out:,}", _sqnr(row.sqnr)) for row in rows
    )
    numbers = ("bytes in", "bytes out", "SQNR dB")
    before, after = sum(row.bytes_in for row in rows), sum(row.bytes_out for row in rows)
    terminal.draw(("tensor", "action", "reason", *numbers), cells, right=numbers)
    terminal.line(f"{len(rows):,} tensors, {before:,} → {after:,} bytes: {after / max(1, before):.3f} of the original")
    for note in report["notes"]:  # type: ignore[attr-defined]
        terminal.line(note)


def _sqnr(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def pack(source: Path, out: Path, wish: VariantWish, progress: Progress = lambda _: None) -> dict[str, object]:
    """Pack a safetensors file or a folder of them into the folder `out`, with a new index where there are several.

    Returns `files`, `tensors` (the report), `bytes_in`, `bytes_out`, `notes`. Raises NotApplicable, BuildFailed;
    FileExistsError when a file of that name is in `out`.
    """
    found = sorted(file for file in source.iterdir() if names.is_weights(file.name)) if source.is_dir() else [source]
    headers = {file: streaming.header(file) for file in found}
    tensors = {name for header in headers.values() for name in header.tensors}
    plans = {file: plan(header, wish, file.name, tensors) for file, header in headers.items()}
    streaming.refuse_nothing([piece for one in plans.values() for piece in one.pieces], wish)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[VariantTensor] = []
    notes: set[str] = set()
    for number, (file, planned) in enumerate(plans.items()):
        share = lambda done, number=number: progress((number + done) / len(plans))  # noqa: E731
        made, said = streaming.write(planned, file, out / file.name, progress=share)
        rows += made
        notes.update(said)
    totals = {key: sum(getattr(row, key) for row in rows) for key in ("bytes_in", "bytes_out")}
    if len(found) > 1:
        _write_index(source, out, plans, totals["bytes_out"])
    return {"files": [file.name for file in found], "tensors": rows, **totals, "notes": sorted(notes)}


def _write_index(source: Path, out: Path, plans: Mapping[Path, Plan], size: int) -> None:
    weight_map: dict[str, str] = {}
    for file, planned in plans.items():
        for piece in planned.pieces:
            weight_map |= {piece.name: file.name} | ({piece.name + packed.SCALE: file.name} if piece.layout else {})
    old = sorted(file.name for file in source.iterdir() if file.name.endswith(names.INDEX))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / (old[0] if old else "model" + names.INDEX)).write_text(json.dumps(index, indent=2))
