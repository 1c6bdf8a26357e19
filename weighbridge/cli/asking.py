"""Questions before what cannot be undone by the next command. Machines are not asked: they say `--yes`."""

from __future__ import annotations

import sys

import typer

from weighbridge import escapes
from weighbridge.cli.exits import Exit, Failed


def confirm(question: str, *, refused: bool = False) -> None:
    """Return when a person at the terminal says yes. Raises Failed when they do not, or when nobody is there.

    `refused`: the registry will say no in any case, so there is nothing to ask.
    """
    if refused:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Failed(f"{escapes.line(question)} No terminal is here to ask: say --yes", Exit.REFUSED)
    if not typer.confirm(escapes.line(question), err=True):
        raise Failed("nothing was changed", Exit.REFUSED)
