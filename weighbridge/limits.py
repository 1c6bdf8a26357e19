"""How long texts may be and how large numbers: one table for the wire, for files that are parsed, for the database's
columns and the commands, so that SQLite and PostgreSQL answer alike and nobody's name becomes a gigabyte of rows.

Names identify: one that is too long is refused. Prose (reasons, notes) quotes what others wrote: it is cut, with a mark
that says so. Lengths are characters, as both databases count them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator, Field

MODEL: Final = 255
ALIAS: Final = 255
TAG_KEY: Final = 255
TAG_VALUE: Final = 5000
TAGS: Final = 200
"""Of one model or version."""
METADATA: Final = 64
"""Entries of what one source (its publisher, its files) says of a version."""
METADATA_VALUE: Final = 4000
METADATA_TEXT: Final = 32_000
"""Names and values of one source together."""
ALIASES: Final = 1000
"""Of one model."""
ACTOR: Final = 255
"""Who did it: a token's name, a worker, a person."""
NAME: Final = 255
"""Of a host, a template, a machine, a token."""
ID: Final = 64
"""A host's id, a digest, a kind of device, a variant's or a metric's name."""
PATH: Final = 1024
"""A key of a store, a checkpoint's path, a URL; S3's own limit of keys."""
TENSOR: Final = 1024
"""A tensor's name, in a header, an index or a program; the longest of real models have about 150."""
UNIT: Final = 32
INTERVAL: Final = 48
"""The id of an interval that a host counted in; its column holds the host's epoch before it."""
ENTRIES: Final = 1000
"""Of a list or a table that somebody sends: models on a host, buckets of a histogram, rows of a benchmark."""
SUBJECT: Final = 64
"""Of an event: `version:17`; `alias:` and a long alias is cut, the whole name is in what the event tells."""
LABELS: Final = 64
"""Labels of a host or a fleet; each key and value is a NAME."""
SHORT: Final = 16
"""Of a status, a role, a verdict: words of ours."""
ETAG: Final = 255
RECIPE: Final = 64 << 10
REASON: Final = 2000
"""Prose: a reason, a note, a sentence about a failure."""
QUOTED: Final = 120
"""A name within prose."""

COUNT: Final = 2**31 - 1
"""Most of what an INTEGER column holds; PostgreSQL refuses more, SQLite would not."""
BYTES: Final = 2**63 - 1
SECONDS: Final = 10 * 366 * 86400.0
"""Longest time that anything may be asked to take or to last: ten years."""
LATEST: Final = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
"""The last day that ISO 8601 and every client can say, in epoch seconds."""


def cut(text: str, most: int = REASON) -> str:
    """Prose within its limit: whole, or its beginning with a mark. Cutting twice changes nothing."""
    if len(text) <= most:
        return text
    mark = f" … ({len(text):,} characters, cut)"
    return text[: max(most - len(mark), 0)] + mark[:most]


def quoted(name: str, most: int = QUOTED) -> str:
    """A name in quotes for a message, whatever it holds and however long it is."""
    shown = repr(name[:most])
    return shown if len(name) <= most else f"{shown[:-1]}…{shown[-1]} ({len(name):,} characters)"


def shown_number(digits: str) -> str:
    """A number that may have thousands of digits, for a message."""
    return digits if len(digits) <= 40 else f"{digits[:20]}… ({len(digits):,} digits)"


def prose(text: str) -> str:
    """Cut, and without what a database or an answer could not hold: a NUL character, half of a surrogate pair."""
    return cut(text).replace("\0", "\\0").encode(errors="backslashreplace").decode()


def is_storable(text: str) -> bool:
    """Whether it holds no NUL, which PostgreSQL refuses, and no half of a surrogate pair, which nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _storable(text: str) -> str:
    if not is_storable(text):
        raise ValueError("text holds no NUL character and no half of a surrogate pair")
    return text


def _prose(value: object) -> object:
    return prose(value) if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_storable)]
ModelName = Annotated[Text, Field(max_length=MODEL)]
Name = Annotated[Text, Field(max_length=NAME)]
Actor = Annotated[Text, Field(max_length=ACTOR)]
Id = Annotated[Text, Field(max_length=ID)]
Path = Annotated[Text, Field(max_length=PATH)]
TagText = Annotated[Text, Field(max_length=TAG_VALUE)]
Labels = Annotated[dict[Name, Name], Field(max_length=LABELS)]
Prose = Annotated[str, BeforeValidator(_prose)]
"""Text that is cut rather than refused."""
Count = Annotated[int, Field(ge=0, le=COUNT)]
Bytes = Annotated[int, Field(ge=0, le=BYTES)]
Seconds = Annotated[float, Field(ge=0, le=SECONDS, allow_inf_nan=False)]
