"""Text of others (names of files, tags, reasons) on its way to a terminal or a log: nothing of it steers either.

Control characters, ANSI sequences, marks that turn the direction of writing, separators of lines and paragraphs, and
halves of surrogate pairs become visible escapes.
"""

from __future__ import annotations

import json


def line(text: str) -> str:
    """One line, whatever it quotes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def lines(text: str) -> str:
    """As `line`, but line ends stay: for text that is ours and quotes nothing, as help."""
    return "\n".join(map(line, text.split("\n")))


def indented(text: str) -> str:
    """Several lines, none of which can be taken for one that begins an entry: a traceback below its log line."""
    return "\n".join(f"    {line(one)}" for one in text.split("\n"))


def in_json(text: str) -> str:
    """The same JSON, with escapes of its own for what no terminal should be sent: it reads as the same value."""
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode()
