"""Where every command's words go: to a person at a terminal, or to a program, a log, a pipe.

At a terminal Rich draws: colours, panels, lines as wide as the window. Anywhere else text is plain and never wrapped,
boxed, coloured or cut, whatever COLUMNS says: a message is one line, a row of a table is one line, a cell is whole.

In both places text of others is escaped here, and nowhere else (weighbridge.escapes).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from traceback import format_exception
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from weighbridge import escapes

_ENDLESS = 1_000_000
"""Columns of a stream that is no terminal. Rich and the help need some number; no line of ours is as long."""
Row = Sequence[str | Text]
_USAGE: Any = typer.BadParameter.__base__
"""Click's UsageError, wherever this Typer has it from (its own copy, or the package)."""


def console(*, stderr: bool = False) -> Console:
    """A console on the stream of this moment."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=_ENDLESS, force_terminal=False, color_system=None)


def line(text: str, *, stderr: bool = False) -> None:
    """Print one line, never wrapped, whatever it quotes."""
    stream = sys.stderr if stderr else sys.stdout
    stream.write(escapes.line(text) + "\n")
    stream.flush()


def lines(texts: Iterable[str]) -> None:
    """Print several on stdout."""
    for text in texts:
        line(text)


def error(program: str, text: str) -> None:
    """Print a message on stderr, in one line whatever it quotes."""
    parts = (part.strip() for part in text.split("\n"))
    line(f"{program}: {'; '.join(filter(None, parts))}", stderr=True)


def is_expected(error: BaseException) -> bool:
    """Whether the message alone tells the user enough: our own errors and the system's. Others are our bugs."""
    return type(error).__module__.startswith("weighbridge.") or isinstance(error, OSError | ImportError)


def run(program: str, main: Callable[[], int]) -> NoReturn:
    """End with what a stage's own command returns; an error that is expected is a line, and 1."""
    try:
        sys.exit(main())
    except Exception as exc:
        if not is_expected(exc):
            traceback(exc)
            sys.exit(1)
        error(program, str(exc) or type(exc).__name__)
        sys.exit(1)


def traceback(exc: BaseException, redact: Callable[[str], str] = str) -> None:
    """Print where an error that nobody expected came from, on stderr: its message may quote a name from a bucket."""
    sys.stderr.write(escapes.indented(redact("".join(format_exception(exc)).rstrip("\n"))) + "\n")
    sys.stderr.flush()


def draw(columns: Sequence[str], rows: Iterable[Row], *, title: str = "", right: Sequence[str] = ()) -> None:
    """Print a `grid` on stdout, below its title."""
    if title:
        line(title)
    show(grid(columns, rows, right=right))


def show(table: Table) -> None:
    """Print a table on stdout."""
    shown = console()
    if shown.is_terminal:
        shown.print(table)
        return
    with shown.capture() as drawn:  # no blanks behind short rows: one long cell would make every line as long
        shown.print(table)
    lines(row.rstrip() for row in drawn.get().rstrip("\n").split("\n"))


def grid(columns: Sequence[str], rows: Iterable[Row], *, right: Sequence[str] = ()) -> Table:
    """A table in the house's form: nothing is read as markup, long cells fold at a terminal, numbers are `right`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name in right else "left")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(escapes.line(cell)) for cell in row))
    return table


class _Outermost:
    """The root command of a Typer app, which decides how help and wrong usage are shown."""

    def main(self, *given: Any, standalone_mode: bool = True, **named: Any) -> Any:
        _dress(self)
        try:
            ended = super().main(*given, standalone_mode=False, **named)  # type: ignore[misc]
        except _USAGE as wrong:
            if not standalone_mode:
                raise
            _refuse(wrong)
        if standalone_mode:
            sys.exit(ended if isinstance(ended, int) else 0)
        return ended


class Group(_Outermost, TyperGroup):
    """`typer.Typer(cls=terminal.Group)`: an app of several commands."""


class Command(_Outermost, TyperCommand):
    """`app.command(cls=terminal.Command)`: an app of one."""


class Arguments(argparse.ArgumentParser):
    """An argparse that says a wrong usage in one line, and whose help depends on no window."""

    def __init__(self, **options: Any) -> None:
        def endless(prog: str) -> argparse.HelpFormatter:
            return argparse.HelpFormatter(prog, width=None if sys.stdout.isatty() else _ENDLESS)

        super().__init__(**{"formatter_class": endless, **options})

    def error(self, message: str) -> NoReturn:
        error(self.prog, f"{message} (see --help)")
        sys.exit(2)


def _dress(root: Any) -> None:
    """Help in panels at a terminal; else plain, an option or a command a line."""
    person = sys.stdout.isatty()
    for command in _tree(root):
        command.rich_markup_mode = "rich" if person else None
    if person:
        root.context_settings.pop("terminal_width", None)
    else:
        root.context_settings["terminal_width"] = _ENDLESS


def _tree(command: Any) -> Iterator[Any]:
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from _tree(child)


def _refuse(wrong: Any) -> NoReturn:
    """Say what is wrong with the arguments, and where to read how they are written."""
    if type(wrong).__name__ == "NoArgsIsHelpError":  # a group without a command: its message is its help
        wrong.show()
    else:
        root, path = ("weighbridge",) * 2 if wrong.ctx is None else (wrong.ctx.find_root(), wrong.ctx.command_path)
        error(getattr(root, "info_name", root), f"{wrong.format_message()} (see {path} --help)")
    sys.exit(wrong.exit_code)
