"""Where a checkpoint comes from, in the words of its publisher and of its files: shown as theirs, deciding nothing.

Whoever publishes is told what is too much. What lies in a bucket may be anybody's: of it as much is kept as is bounded,
with a mark where more was there, and no checkpoint is refused for what is only said beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from weighbridge import limits
from weighbridge.storage.errors import StorageError

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What a database takes for no text: NUL, and halves of characters that JSON can spell."""


class InvalidMetadata(StorageError, ValueError):
    """Metadata or tags that cannot be kept as they are; the message names the entry, the rule, and what to give."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is said of a checkpoint: by its publisher (`publish(metadata=…)`), by its weight files (`__metadata__`), and
    the tags that the publisher wishes for the version."""

    publisher: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def check(said: Mapping[str, str] | None, what: str) -> dict[str, str]:
    """What a publisher gives, as it will be kept. Raises InvalidMetadata; `what` is `metadata` or `tag`."""
    given: Mapping[Any, Any] = {} if said is None else said
    if not isinstance(given, Mapping):
        raise InvalidMetadata(f"{what}: {type(given).__name__} is no mapping of names to text")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str):
            kind = type(value if isinstance(name, str) else name).__name__
            raise InvalidMetadata(f"{what} {name!r} is {kind}, not text: give str(…)")
        if not name.strip() or len(name) > limits.NAME or not name.isprintable():
            raise InvalidMetadata(f"{what} {limits.quoted(name)}: a name has 1 to {limits.NAME} printable characters")
        if len(value) > limits.METADATA_VALUE or not limits.is_storable(value):
            raise InvalidMetadata(
                f"{what} {name!r} has {len(value):,} characters: at most {limits.METADATA_VALUE:,}, without NUL; "
                "put a longer text into a file of the checkpoint"
            )
    text = sum(len(name) + len(value) for name, value in given.items())
    if len(given) > limits.METADATA or text > limits.METADATA_TEXT:
        most = f"at most {limits.METADATA} entries of {limits.METADATA_TEXT:,} characters altogether are kept"
        raise InvalidMetadata(f"{what}: {len(given):,} entries, {text:,} characters: {most}")
    return dict(given)


def bounded(said: Mapping[str, str]) -> dict[str, str]:
    """As much as is kept of what a stranger says, in its order; what is cut says so."""
    kept: dict[str, str] = {}
    left = limits.METADATA_TEXT
    for name, value in islice(said.items(), limits.METADATA):
        name, value = _cut(name, limits.NAME), _cut(value, min(limits.METADATA_VALUE, left))
        if not name.strip() or len(name) + len(value) > left:
            continue
        kept[name] = value
        left -= len(name) + len(value)
    return kept


def of_files(said: Iterable[tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    """What the files say, each by its path: shards mostly say the same, and what one says otherwise bears its name."""
    together: dict[str, str] = {}
    for path, metadata in said:
        for name, value in islice(metadata.items(), limits.METADATA):
            if together.setdefault(name, value) != value:
                together[f"{path}: {name}"] = value
        if len(together) > limits.METADATA:
            break
    return bounded(together)


def _cut(text: str, most: int) -> str:
    return limits.cut(_NO_TEXT.sub("\ufffd", text), most)
