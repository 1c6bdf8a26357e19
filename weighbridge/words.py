"""Figures in sentences, the same in every room."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 row`, `1,200 rows`, `2 classes` (whose plural is given)."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
