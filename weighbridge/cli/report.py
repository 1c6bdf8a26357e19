"""The report: everything that is known of a version as one page that opens anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weighbridge.cli import output, session
from weighbridge.cli.exits import needs
from weighbridge.cli.versions import ModelName, Selector

PANEL = "Models"


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel=PANEL)(report)


def report(
    context: typer.Context,
    model: ModelName,
    version: Selector = "latest",
    file: Annotated[
        Path | None, typer.Option("--output", "-o", help="Else MODEL-VERSION.html, here.", dir_okay=False)
    ] = None,
    json: session.Json = False,
) -> None:
    """Write a version's plots, tables and model card as one HTML file, and print its path.

    It needs no network and holds no script: mail it, print it, keep it beside the release.

    Example: weighbridge report digits champion -o report.html
    """
    with needs("report"):
        from weighbridge.report import page, subject
    with session.of(context).client() as client:
        found = subject.collect(client, model, version)
    written = file or Path(page.file_name(found))
    written.write_text(page.render(found), encoding="utf-8")
    if json:
        output.emit({"path": str(written), "model": found.version.model, "version": found.version.number})
        return
    output.line(str(written))
