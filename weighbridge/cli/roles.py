"""The processes: `up` runs all of them on one machine, the others are one role each."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from weighbridge.cli import session, telling
from weighbridge.cli.exits import needs

PANEL = "Run it"


def register(app: typer.Typer) -> None:
    for command in (up, daemon, worker, registry, host):
        app.command(rich_help_panel=PANEL)(command)


def up(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(help="Folder to watch; else storage.url, which may be s3://….")
    ] = None,
    hosts: Annotated[int, typer.Option(min=0, help="Inference hosts to run.")] = 2,
    seconds: Annotated[float | None, typer.Option("--for", metavar="SECONDS", help="End by itself after this.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no line for what happens.")] = False,
    json: session.Json = False,
) -> None:
    """Run everything on one machine with embedded parts; Ctrl-C stops it all, a second start goes on where it was.

    The first line says where everything is; then comes one for whatever happens (with --json an object a line).

    Example: weighbridge up ./drops
    """
    run = session.of(context)
    if folder is not None:
        run.override(storage__url=str(folder))
    run.logging()
    with needs("up"):
        from weighbridge.daemon.up import run as supervise

    began = datetime.now(UTC)

    def follow(data: Path) -> None:
        from weighbridge.registry import local
        from weighbridge.registry.client import Client

        with Client(data=data, token=local.read_token(data)) as client:
            telling.follow(client, began, json=json)

    follows = None if quiet else follow
    raise typer.Exit(supervise(run.settings, hosts=hosts, seconds=seconds, json=json, follow=follows))


def daemon(context: typer.Context) -> None:
    """Run the loops: intake, dispatch, reconcile, rollout ticks. Several daemons at once do no harm.

    Example: weighbridge --config /etc/weighbridge.toml daemon
    """
    run = session.of(context)
    run.logging()
    settings = run.settings
    with needs("daemon"):
        from weighbridge.daemon.run import run as loops

    raise typer.Exit(loops(settings))


def worker(
    context: typer.Context,
    queues: Annotated[str | None, typer.Option(help="Queues to take jobs from, with commas: cpu,gpu,control.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Jobs at once.")] = None,
    device: Annotated[str | None, typer.Option(help="Device to validate and evaluate on.")] = None,
) -> None:
    """Run jobs: validate and evaluate checkpoints, move rollouts.

    Example: weighbridge worker --queues cpu --concurrency 4
    """
    run = session.of(context)
    names = tuple(filter(None, (name.strip() for name in queues.split(",")))) if queues else None
    run.override(worker__queues=names, worker__concurrency=concurrency, worker__device=device)
    run.logging()
    with needs("worker"):
        from weighbridge.workers.run import run as work

    raise typer.Exit(work(run.settings))


def registry(
    context: typer.Context,
    address: Annotated[str | None, typer.Option("--host", help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: a free one.")] = None,
    migrate: Annotated[bool, typer.Option(help="Bring the database to the newest schema first.")] = True,
) -> None:
    """Serve the registry's API.

    Example: weighbridge registry --host 0.0.0.0 --port 8400
    """
    run = session.of(context)
    run.override(registry__host=address, registry__port=port)
    run.logging()
    import logging

    from weighbridge.daemon.systemd import notify

    with needs("registry"):
        from weighbridge.daemon.sockets import socket_path
        from weighbridge.registry.serve import run as serve
    if run.settings.registry.socket is None:
        run.override(registry__socket=socket_path(run.settings.data.absolute(), name="registry.sock"))

    def ready(url: str) -> None:
        logging.getLogger(__name__).info("the registry answers at %s", url)
        notify("READY=1")

    raise typer.Exit(serve(run.settings, migrate=migrate, ready=ready))


def host(
    context: typer.Context,
    name: Annotated[str | None, typer.Option(help="The host's name; else the machine's.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve inference on; 0: a free one.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label that fleets choose by.")] = None,
    device: Annotated[str | None, typer.Option(help="Device to serve on.")] = None,
) -> None:
    """Run a host agent: it pulls what it should serve, checks it, serves it.

    Example: weighbridge --registry https://registry:8400 host --name gpu-7 --label zone=a
    """
    run = session.of(context)
    labels = dict(_label(text) for text in label) if label else None
    run.override(host__name=name, host__port=port, host__labels=labels, host__device=device)
    run.logging()
    with needs("host"):
        from weighbridge.hosts.run import run as serve

    raise typer.Exit(serve(run.settings))


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise typer.BadParameter(f"{text!r}: write KEY=VALUE", param_hint="--label")
    return key, value
