"""What a key may be: one rule for every driver, so that no key of a bucket can name a path outside a folder."""

from __future__ import annotations

from weighbridge import escapes, limits
from weighbridge.storage.errors import InvalidKey

TEMPORARY = ".weighbridge-"
"""Names with this start are our own unfinished files: never listed, never valid keys."""
_LONGEST_SHOWN = 1000
"""Characters; a path's column has 1,024."""


def check_key(key: str) -> str:
    """Return `key` if it is a valid key. Raises InvalidKey, naming the rule."""
    if not key:
        raise InvalidKey("a key cannot be empty", key=key)
    if reason := fault(key):
        raise InvalidKey(f"{key!r} is not a valid key: {reason}", key=key)
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or the start of valid keys. Raises InvalidKey."""
    if prefix and (reason := fault(prefix.removesuffix("/"))):
        raise InvalidKey(f"{prefix!r} is not a valid prefix: {reason}", key=prefix)
    return prefix


def is_valid(key: str) -> bool:
    """Say whether `key` is valid, for listings that pass over what is not (`a//b`, a console's `folder/` markers)."""
    return bool(key) and fault(key) is None


def shown(key: str) -> str:
    """A key that may be invalid, for people and for rows: printable, and not longer than a valid one."""
    text = escapes.line(key)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def where_faulty(key: str) -> str:
    """An invalid key up to its first faulty part, as `shown`; it ends in `/` where more lies below that part."""
    parts = key.split("/")
    for number, part in enumerate(parts):
        if not part or fault(part):
            end = number + (1 if part else 2)
            return shown("/".join(parts[:end])) + "/" * (len(parts) > end)
    return shown(key)


def fault(key: str) -> str | None:
    """Why `key` is not valid; None when it is."""
    if "\0" in key or "\\" in key:
        return "it has a NUL or a backslash"
    if len(key.encode("utf-8", "surrogateescape")) > limits.PATH:
        return f"it is longer than {limits.PATH:,} bytes"
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        return "it is not Unicode text"
    for part in key.split("/"):
        if part in ("", ".", ".."):
            return f"it has a part {part!r}" if part else "it is absolute, ends in '/' or has an empty part"
        if part.startswith(TEMPORARY):
            return f"names starting with {TEMPORARY!r} are Weighbridge's own unfinished files"
    return None
