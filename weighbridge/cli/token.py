"""Tokens: who may call the registry."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from weighbridge.cli import output, session

group = typer.Typer(no_args_is_help=True, help="Who may call the registry: create, list, revoke.")


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="token", rich_help_panel="Look after it")


@group.command()
def create(
    context: typer.Context,
    role: Annotated[str, typer.Argument(help="viewer, publisher, approver, admin, enrol or host.")],
    name: Annotated[str, typer.Option(help="What it is for; events name it as the actor.")] = "",
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires; else until revoked.")] = None,
    host_id: Annotated[str | None, typer.Option(help="Bind a host or enrol token to this host.")] = None,
    json: session.Json = False,
) -> None:
    """Create a token; it is printed once and never again.

    Example: weighbridge token create enrol --name gpu-7 --days 1
    """
    ttl = None if days is None else days * 86400
    with session.of(context).client() as client:
        token = client.create_token(role, name, ttl=ttl, host_id=host_id)
    if json:
        output.emit({"role": role, "name": name, "token": token})
    else:
        output.line(token)


@group.command()
def link(context: typer.Context, json: session.Json = False) -> None:
    """Print an address that signs a browser in, once, within an hour; the session reads, for some hours.

    Example: weighbridge token link
    """
    with session.of(context).client() as client:
        address = client.browser_address()
    if json:
        output.emit({"browser": address})
    else:
        output.line(address)


@group.command("list")
def listed(context: typer.Context, json: session.Json = False) -> None:
    """List the tokens, never their values. Example: weighbridge token list"""
    with session.of(context).client() as client:
        found = list(client.tokens())
    if json:
        output.emit(found)
        return
    columns = ("id", "role", "name", "host", "created", "expires", "last used", "revoked")
    rows = (
        (t.id, t.role, t.name, t.host_id, t.created_at, _date(t.expires_at), t.used_at, _date(t.revoked_at))
        for t in found
    )
    output.table(columns, rows, empty="no tokens")


@group.command()
def revoke(
    context: typer.Context,
    token: Annotated[int, typer.Argument(metavar="ID", help="The token's number, from `token list`.")],
    force: Annotated[bool, typer.Option("--force", help="Also that of a host which serves: it is cut off.")] = False,
    json: session.Json = False,
) -> None:
    """Revoke a token at once. Example: weighbridge token revoke 4"""
    with session.of(context).client() as client:
        client.revoke_token(token, force=force)
    if json:
        output.emit({"revoked": token})
    else:
        output.line(f"token {token} is revoked")


def _date(when: datetime | None) -> str:
    return "" if when is None else f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
