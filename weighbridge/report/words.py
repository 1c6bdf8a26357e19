"""Figures as people read them, and names from a bucket made harmless. Escaping for HTML is the template's."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

NOTHING = "–"
"""Stands where nothing is known."""
_UNITS = ("B", "kB", "MB", "GB", "TB")


def clean(text: str) -> str:
    """Control characters, and those that turn the direction of writing, as escapes. Line ends become blanks."""
    flat = text.replace("\n", " ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)


def short(text: str, most: int = 34) -> str:
    """The middle of a long name left out: its ends tell it from others."""
    shown = clean(text)
    if len(shown) <= most:
        return shown
    tail = (most - 1) // 2
    return f"{shown[: most - 1 - tail]}…{shown[-tail:]}"


def size(count: float | None) -> str:
    """Bytes: `3.4 MB`."""
    if count is None:
        return NOTHING
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def time(seconds: float | None) -> str:
    """Three digits with the unit that suits: `1.24 ms`."""
    if seconds is None:
        return NOTHING
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{_digits(seconds / factor)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def round_time(seconds: float) -> str:
    """A mark of an axis: `5 ms`."""
    factor, unit = (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")
    return f"{seconds / factor:.3g} {unit}"


def rate(value: float | None) -> str:
    """Rows a second, three digits."""
    return NOTHING if value is None else f"{_digits(value)}"


def interval(low: float | None, high: float | None) -> str:
    """What stands behind a ratio; nothing where it is not known."""
    return "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f} ×"


def percent(share: float | None, digits: int = 1) -> str:
    return NOTHING if share is None else f"{share:.{digits}%}"


def number(value: float | None) -> str:
    """Four digits."""
    return NOTHING if value is None else f"{value:.4g}"


def decibel(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def moment(then: datetime | None) -> str:
    """To the minute, in UTC; naive times are UTC."""
    if then is None:
        return NOTHING
    aware = then if then.tzinfo else then.replace(tzinfo=UTC)
    return f"{aware.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def pairs(values: dict[str, Any]) -> str:
    """`torch 2.13, torchao 0.18`."""
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items())) or NOTHING


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
