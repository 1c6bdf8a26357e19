"""What commands print: tables for people, JSON for programs. Answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from weighbridge import escapes
from weighbridge.terminal import console, draw, error, line, show
from weighbridge.words import counted

__all__ = (
    "ago",
    "cell",
    "console",
    "counted",
    "emit",
    "error",
    "line",
    "note",
    "pairs",
    "plain",
    "show",
    "size",
    "table",
)

_COLOURS = {
    "ready": "green", "finished": "green", "live": "green", "done": "green", "passed": "green", "ok": "green",
    "rejected": "red", "quarantined": "red", "failed": "red", "rolled_back": "red", "lost": "red", "refused": "red",
    "silent": "red",
    "discovered": "cyan", "running": "cyan", "waiting": "yellow", "holding": "yellow", "paused": "yellow",
    "needs_binding": "yellow", "superseded": "dim", "duplicate": "dim", "archived": "dim", "pending": "yellow",
}  # fmt: skip


def note(text: str) -> None:
    """One line for the person at the terminal, not part of the answer."""
    console(stderr=True).print(Text(escapes.line(text)))


def emit(value: Any) -> None:
    """Print one JSON value on one line. Wire types become what the API sends."""
    sys.stdout.write(escapes.in_json(json.dumps(plain(value), ensure_ascii=False)) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """A JSON value of wire types, sequences and dictionaries."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "nothing", title: str = "") -> None:
    """Print rows under headings; `empty` says in words that there are none. Nothing is read as Rich markup."""
    body = [[cell(value) for value in row] for row in rows]
    if not body:
        note(empty)
        return
    draw(columns, body, title=title)


def cell(value: Any) -> Text:
    """One value as text in one line: times relative to now, statuses in colour."""
    if isinstance(value, Text):
        return value
    if isinstance(value, datetime):
        return Text(ago(value))
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return Text(escapes.line(text), style=_COLOURS.get(text, ""))


def pairs(values: dict[str, Any]) -> str:
    """`zone=a, gpu=no`."""
    return ", ".join(f"{key}={value}" for key, value in sorted(values.items()))


def ago(then: datetime) -> str:
    """`12 s ago`; naive times are UTC."""
    aware = then if then.tzinfo else then.replace(tzinfo=UTC)
    seconds = max(0, (datetime.now(UTC) - aware).total_seconds())
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds / 86400:.0f} days ago"


def size(count: int | None) -> str:
    """Bytes for people: `3.4 MB`."""
    if count is None or count < 0:
        return ""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
