"""Benchmarks by hand: measure an artifact on this machine, and bring to the registry what was measured on another."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from weighbridge.cli import output, session
from weighbridge.cli.exits import Exit, Failed, needs
from weighbridge.cli.versions import ModelName, Selector

PANEL = "Models"
app = typer.Typer(no_args_is_help=True, help="Measure a variant by hand, again, or record what was measured elsewhere.")


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="benchmark", rich_help_panel=PANEL)


@app.command("run")
def run(
    artifact: Annotated[str, typer.Argument(metavar="DIGEST", help="The manifest's digest (`weighbridge variants`).")],
    blobs: Annotated[Path, typer.Option(help="Folder that holds blobs/, or a copy of it.", file_okay=False)],
    against: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="The original's manifest; else it runs against itself.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine, on a CPU.")] = 1,
    factory: Annotated[list[str] | None, typer.Option(help="Pattern of allowed factories; may be repeated.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="Besides the one that hosts serve in: compiled, cuda_graph; repeatable.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="To measure for on a free machine, beside loading (s).")
    ] = 4.0,
    limit: Annotated[float, typer.Option(min=1, help="Until it ends, whatever happens (s).")] = 120.0,
    full: Annotated[bool, typer.Option("--full", help="Sweep more batches, callers and rates.")] = False,
    json: session.Json = False,
) -> None:
    """Measure an artifact on this machine: no registry, no Celery, no database.

    Beside other work the ratio to the original is measured all the same; what needs a free machine is marked.

    Ends with 1 where it cannot be measured, or not within the limit.

    Example: weighbridge benchmark run DIGEST --against ORIGINAL --blobs ./blobs-of-it --device cuda --json > out.json
    """
    with needs("variants"):
        from weighbridge.storage.in_place import InPlace
        from weighbridge.workers.benchmark import BenchmarkTask, benchmark
        from weighbridge.workers.benchmarking import report
        from weighbridge.workers.benchmarking.machine import Machine
    from weighbridge.registry.schemas import Benchmark

    task = BenchmarkTask(
        artifact=artifact,
        original=against or artifact,
        device=device,
        threads=threads,
        factories=tuple(factory or ()),
        modes=tuple(mode or ()),  # type: ignore[arg-type]  # the stage names a mode that it does not know
        depth="full" if full else "quick",
        seconds=seconds,
        limit=limit,
    )
    kept = InPlace.of(blobs)
    outcome = benchmark(task, cache=kept.path, machine=Machine())
    measured = [Benchmark.model_validate(outcome.facts["benchmark"])] if "benchmark" in outcome.facts else []
    if json:
        output.emit(measured)
    else:
        report.show(measured)
    output.note(f"{outcome.verdict}: {outcome.reason}")
    raise typer.Exit(Exit.OK if outcome.verdict == "passed" else Exit.FAILED)


@app.command("retry")
def retry(
    context: typer.Context,
    model: ModelName,
    version: Selector = "latest",
    variant: Annotated[str | None, typer.Argument(help="Only this variant; else all of them.")] = None,
    json: session.Json = False,
) -> None:
    """Have a version's variants measured again by the workers, now: what a busy machine could not show.

    Example: weighbridge benchmark retry digits champion onnx
    """
    with session.of(context).client() as client:
        found = client.retry_benchmarks(model, version, variant)
    if json:
        output.emit(found)
        return
    rows = ((job.id, job.part, job.state, f"{job.attempt} of {job.max_attempts}") for job in found)
    output.table(("job", "kind", "state", "tries"), rows, title="Measured again")


@app.command("import")
def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="What `benchmark run --json` printed.", dir_okay=False)],
    json: session.Json = False,
) -> None:
    """Record measurements of another machine, for the variants that have their artifacts.

    Example: weighbridge benchmark import out.json
    """
    from pydantic import TypeAdapter, ValidationError

    from weighbridge.registry.schemas import Benchmark

    try:
        measured = TypeAdapter(list[Benchmark]).validate_json(file.read_bytes())
    except OSError as exc:
        raise Failed(f"{file}: {exc.strerror}") from exc
    except (ValidationError, jsonlib.JSONDecodeError) as exc:
        raise Failed(f"{file} is not what `weighbridge benchmark run --json` prints: {exc}") from exc
    with session.of(context).client() as client:
        recorded = [row for one in measured for row in client.import_benchmark(one)]
    if json:
        output.emit(recorded)
        return
    rows = ((r.variant, r.status, r.finding, r.hardware.get("label", r.kind), r.reason) for r in recorded)
    output.table(("variant", "status", "finding", "hardware", "reason"), rows, empty="the file holds no measurement")
