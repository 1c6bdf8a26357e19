"""JSON from strangers: no duplicate keys, no NaN, no depth bombs, and a difference between *broken off* and *wrong*."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from weighbridge import limits


class InvalidJson(ValueError):
    """The text is no JSON object, or has a duplicate key."""


class TruncatedJson(InvalidJson):
    """The text begins like a JSON object and ends before it does: more may come."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raises TruncatedJson, InvalidJson."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite)
    except json.JSONDecodeError as error:
        if _broken_off(error):
            raise TruncatedJson(f"it ends after {len(data):,} bytes, inside an object") from error
        raise InvalidJson(f"no valid JSON: {error.msg} at character {error.pos:,}") from error
    except InvalidJson:
        raise
    except UnicodeDecodeError as error:
        if error.end == len(data) and data.lstrip()[:1] == b"{" and error.reason == "unexpected end of data":
            raise TruncatedJson(f"it ends after {len(data):,} bytes, inside a character") from error
        raise InvalidJson(f"no valid JSON: not UTF-8 at byte {error.start:,}") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise InvalidJson(f"no acceptable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidJson("no JSON object")
    return value


def _broken_off(error: json.JSONDecodeError) -> bool:
    """Say whether the text may be the beginning of an object: the parser failed in its last token, not before."""
    text = error.doc.rstrip()
    if not text.lstrip():
        return True
    in_last_token = error.msg.startswith("Unterminated string") or len(text) - error.pos <= len("\\uABCD")
    return text.lstrip()[0] == "{" and in_last_token


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its members, in which no name is twice. Raises InvalidJson."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidJson(f"the key {limits.quoted(twice)} is there twice")
    return result


def refuse_constant(name: str) -> NoReturn:
    """NaN and infinities, which Python would read. Raises InvalidJson."""
    raise InvalidJson(f"{name} is no JSON")


def finite(digits: str) -> float:
    """A number with a point or an exponent. Raises InvalidJson where it is too large for one."""
    value = float(digits)
    if math.isinf(value):
        raise InvalidJson(f"the number {limits.shown_number(digits)} is larger than any that can be kept")
    return value


def within(data: bytes, *, values: int, depth: int) -> dict[str, Any]:
    """`parse_object` for what may cost little and is kept: values are counted before they are made, nesting is bounded,
    and every text can be stored. Raises TruncatedJson, InvalidJson.
    """
    if sum(map(data.count, (b",", b":", b"[", b"{"))) > values:
        raise InvalidJson(f"it holds more than {values:,} values")
    value = parse_object(data)
    level: list[Any] = [value]
    for _ in range(depth):
        inner = [one for outer in level for one in _inner(outer)]
        if b"\\u" in data and not all(limits.is_storable(one) for one in inner if isinstance(one, str)):
            raise InvalidJson("it holds a NUL character or half of a surrogate pair")
        level = [one for one in inner if isinstance(one, dict | list)]
    if level:
        raise InvalidJson(f"it is nested deeper than {depth}")
    return value


def _inner(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else value
