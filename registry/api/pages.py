"""Pages by a budget of bytes: what does not fit is on the next page, whatever rows hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel

from weighbridge.registry.schemas import Page

T = TypeVar("T", bound=BaseModel)


def page(items: Sequence[T], cursors: Sequence[object], *, limit: int, most_bytes: int) -> Page[T]:
    """The items that fit (one at least), of at most `limit` that were asked for. `cursors`: what follows each."""
    kept = fitting(items, most_bytes)
    ends = len(kept) == len(items) < limit
    return Page(items=kept, next=None if ends or not kept else str(cursors[len(kept) - 1]))


def fitting(items: Sequence[T], most_bytes: int, *, size: Callable[[T], int] | None = None) -> list[T]:
    """The first items that are together no longer than `most_bytes`; one at least."""
    kept: list[T] = []
    left = most_bytes
    for item in items:
        left -= size(item) if size is not None else len(item.model_dump_json())
        if left < 0 and kept:
            break
        kept.append(item)
    return kept
