"""What listings have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from weighbridge.storage.keys import check_prefix
from weighbridge.storage.protocols import Entry, ObjectInfo, PassedOver


def one_level(objects: Iterable[ObjectInfo], prefix: str) -> Iterator[Entry]:
    """Fold a full listing, all of a folder together, into the level under `prefix`. Raises ValueError."""
    check_folder(prefix)
    last = ""
    for info in objects:
        name, slash, _ = info.key[len(prefix) :].partition("/")
        if not slash:
            yield Entry(info.key, info)
        elif name != last:
            last = name
            yield Entry(f"{prefix}{name}/", None)


def objects_of(found: Iterable[ObjectInfo | PassedOver]) -> Iterator[ObjectInfo]:
    """The objects of a survey. Raises what the store answered where it could not look: then the list is not whole."""
    for one in found:
        if isinstance(one, ObjectInfo):
            yield one
        elif one.error is not None:
            raise one.error


def check_folder(prefix: str) -> str:
    """Return a prefix that is empty or ends in `/`. Raises ValueError, InvalidKey."""
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"the prefix of a level must be empty or end in '/', not {prefix!r}")
    return check_prefix(prefix)
