"""The root command: global flags, the groups, and the one place where errors become exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from weighbridge import terminal
from weighbridge.cli import exits, output, session
from weighbridge.cli.session import Session

EPILOG = (
    "Exit codes: 0 ok, 1 failed or a negative verdict, 2 wrong usage or settings, 3 not found, 4 refused or conflict, "
    "5 unavailable, 130 interrupted."
)

app = typer.Typer(
    name="weighbridge",
    cls=terminal.Group,
    help="A checkpoint dropped into storage is weighed, and then it rolls.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from weighbridge import __version__

        typer.echo(f"weighbridge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Settings file; else $WEIGHBRIDGE_CONFIG, else ./weighbridge.toml."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Override one setting: registry.port=0.")
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            "--registry",
            metavar="URL",
            help="The registry to talk to; else that of the data folder here or above, else registry.url.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FOLDER", help="The data folder, and its registry (data).")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error (log.level).")] = None,
    log_format: Annotated[str | None, typer.Option(help="human or json (log.format).")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Log everything; show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
    flags = dict(map(session.split_setting, settings or ()))
    named = {"registry.url": registry, "data": data, "log.level": log_level, "log.format": log_format}
    flags |= {name: value for name, value in named.items() if value is not None}
    context.obj = Session(config=config, flags=flags, debug=debug)


def run(arguments: Sequence[str]) -> int:
    """Run one command. Errors are one line on stderr; a traceback only with --debug."""
    try:
        app(list(arguments), prog_name="weighbridge")
    except SystemExit as exc:  # Typer's own end: usage errors are 2, an interrupt is 130
        return exc.code if isinstance(exc.code, int) else exits.Exit.OK
    except Exception as exc:
        return _report(exc, debug="--debug" in arguments)
    return exits.Exit.OK


def _report(error: Exception, *, debug: bool) -> int:
    from weighbridge.logs import Redact

    if debug:
        terminal.traceback(error, Redact())
    if terminal.is_expected(error):
        text = str(error) or type(error).__name__
    else:
        text = f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"
    output.error("weighbridge", Redact()(text))
    return exits.code_of(error)


def _register() -> None:
    from weighbridge.cli import (
        alias,
        benchmark,
        config,
        demo,
        doctor,
        fleet,
        report,
        roles,
        rollouts,
        template,
        token,
        transfer,
        variants,
        versions,
    )

    for module in (
        *(roles, demo, transfer, versions, variants, benchmark, report, alias, template),
        *(fleet, rollouts, token, doctor, config),
    ):
        module.register(app)


_register()
