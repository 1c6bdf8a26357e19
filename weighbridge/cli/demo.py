"""`weighbridge demo`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weighbridge.cli import output, session
from weighbridge.cli.exits import Exit, needs

if TYPE_CHECKING:
    from weighbridge.demo.run import Result


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Run it")(demo)


def demo(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to keep it all; else a temporary folder that is removed.")
    ] = None,
    s3: Annotated[bool, typer.Option("--s3", help="On S3 instead of a folder: starts a SeaweedFS.")] = False,
    json: session.Json = False,
) -> None:
    """Train on real digits, drop eight checkpoints, watch them weighed and rolled out, ask both hosts.

    Exit 1 if any verdict is wrong. With --json the last line is the result, everything else goes to stderr.

    Examples: weighbridge demo; weighbridge demo --s3 --json
    """
    with needs("demo"):
        import sklearn  # noqa: F401
        import torch

        from weighbridge.demo.run import run
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything it started ends with it
    console = output.console(stderr=json)
    result = run(console, folder=folder, s3=s3, live=console.is_terminal)
    if json:
        output.emit(result.as_json())
    else:
        _print(result)
    if not result.ok:
        raise typer.Exit(Exit.FAILED)


def _print(result: Result) -> None:
    from weighbridge.demo.board import table

    console = output.console()
    console.print()
    if not console.is_terminal:
        console.print(table(result.rows))
    for host in result.hosts:
        output.line(f"{host['name']} at {host['url']} serves version {host['version']}: {host['accuracy']:.1%} right")
    if result.sentinel:
        output.line("the pickle's code RAN")
    wrong = [row.drop.name for row in result.rows if not row.right]
    output.line("every verdict is right" if result.ok else f"wrong: {', '.join(wrong) or 'see the hosts above'}")
