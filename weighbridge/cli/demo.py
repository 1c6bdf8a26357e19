"""`weighbridge demo`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weighbridge.cli import output, session
from weighbridge.cli.exits import Exit, needs

if TYPE_CHECKING:
    from weighbridge.demo.run import Measured, Result


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Run it")(demo)


def demo(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to keep it all; else a temporary folder that is removed.")
    ] = None,
    s3: Annotated[bool, typer.Option("--s3", help="On S3 instead of a folder: starts a SeaweedFS.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The eight drops alone, without variants.")] = False,
    json: session.Json = False,
) -> None:
    """Drop eight checkpoints of real digits, watch them weighed and rolled out; then build and measure variants.

    Two models' variants are judged and measured, and both hosts serve what measured best. Exit 1 if any verdict is
    wrong. With --json the last line is the result, everything else goes to stderr.

    Examples: weighbridge demo; weighbridge demo --quick; weighbridge demo --s3 --json
    """
    with needs("demo"):
        import sklearn  # noqa: F401
        import torch

        from weighbridge.demo.run import run
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything it started ends with it
    console = output.console(stderr=json)
    first, second = run(console, folder=folder, s3=s3, live=console.is_terminal, variants=not quick)
    ok = first.ok and (second is None or second.ok)
    if json:
        output.emit(first.as_json() | {"ok": ok} | ({"second": second.as_json()} if second else {}))
    else:
        _print(first)
        if second is not None:
            _print_variants(second)
    if not ok:
        raise typer.Exit(Exit.FAILED)


def _print(result: Result) -> None:
    from weighbridge.demo.board import table

    console = output.console()
    console.print()
    if not console.is_terminal:
        output.show(table(result.rows))
    for host in result.hosts:
        output.line(f"{host['name']} at {host['url']} serves version {host['version']}: {host['accuracy']:.1%} right")
    if result.sentinel:
        output.line("the pickle's code RAN")
    wrong = [row.drop.name for row in result.rows if not row.right]
    output.line("every verdict is right" if result.ok else f"wrong: {', '.join(wrong) or 'see the hosts above'}")


def _print_variants(measured: Measured) -> None:
    from weighbridge.demo.entries import table

    console = output.console()
    console.print()
    if not console.is_terminal:
        output.show(table(measured.entries))
    for entry in measured.entries:
        if entry.status == "rejected":
            output.line(f"{entry.model} {entry.variant} was refused: {entry.reason}")
    for one in measured.served:
        output.line(one.line())
    output.line("every variant is as it has to be" if measured.ok else f"wrong: {'; '.join(measured.wrong)}")
