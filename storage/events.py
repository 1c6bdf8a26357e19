"""What every event source says: look here. Nothing in an event is believed; each look is a HEAD or a LIST."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What may have happened."""

    CREATED = "created"
    """The object `key` appeared, or has new content."""
    REMOVED = "removed"
    """The object `key` went away."""
    RESCAN = "rescan"
    """Anything may have happened under the prefix `key` (empty: anywhere); list it."""


@dataclass(frozen=True, slots=True)
class ObjectEvent:
    """A hint; it may be late, doubled, out of order, or false. `source` says where it came from, for logs."""

    kind: Kind
    key: str
    source: str = ""


Sink = Callable[[ObjectEvent], None]
"""Takes events; called from the source's own thread, so it hands over and returns."""
