"""Aliases: movable names of versions."""

from __future__ import annotations

from typing import Annotated

import typer

from weighbridge.cli import output, session
from weighbridge.cli.versions import PANEL, ModelName

group = typer.Typer(no_args_is_help=True, help="Name versions: list, set, delete.")
AliasName = Annotated[str, typer.Argument(metavar="ALIAS", help="The alias: staging, best …")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="alias", rich_help_panel=PANEL)


@group.command("list")
def listed(context: typer.Context, model: ModelName, json: session.Json = False) -> None:
    """List a model's aliases. Example: weighbridge alias list digits"""
    with session.of(context).client() as client:
        found = list(client.aliases(model))
    if json:
        output.emit(found)
        return
    output.table(("alias", "version"), ((a.name, a.number) for a in found), empty="no aliases")


@group.command("set")
def put(
    context: typer.Context,
    model: ModelName,
    name: AliasName,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="The version's number.")],
    json: session.Json = False,
) -> None:
    """Point an alias at a version. Example: weighbridge alias set digits staging 3"""
    with session.of(context).client() as client:
        alias = client.set_alias(model, name, version)
    if json:
        output.emit(alias)
    else:
        output.line(f"{name} of {model} is version {version}")


@group.command("delete")
def delete(context: typer.Context, model: ModelName, name: AliasName, json: session.Json = False) -> None:
    """Delete an alias. Example: weighbridge alias delete digits staging"""
    with session.of(context).client() as client:
        client.delete_alias(model, name)
    if json:
        output.emit({"model": model, "deleted": name})
    else:
        output.line(f"{model} has no alias {name} any more")
