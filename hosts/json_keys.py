"""Parses JSON that must not say anything twice: of two equal keys one reader takes the first, another the last, and
what a proxy has checked is then not what is computed.

orjson takes the last one silently and is ten times as fast as a parser that can tell. So its result's keys are counted,
and compared with the text's: only where the numbers differ is it read once more, pair by pair.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from weighbridge.hosts.errors import BadRequest, TooLarge

MOST_PARTS = 1 << 20
"""Most lists, objects and members of lists in one text: each takes many times its bytes."""
_KEY = re.compile(rb'"\s*:')


def read(text: bytes) -> Any:
    """The parsed text. Raises BadRequest, TooLarge, orjson.JSONDecodeError."""
    if len(text) > MOST_PARTS and text.count(b",") + text.count(b"[") + text.count(b"{") > MOST_PARTS:
        raise TooLarge(f"JSON of more than {MOST_PARTS} parts besides its numbers: send the tensors as binary data")
    parsed = orjson.loads(text)
    # Behind each key is a colon. There are others inside strings, fewer of them right behind a quote.
    if text.count(b":") != (keys := _keys(parsed)) and len(_KEY.findall(text)) != keys:
        _compare(text)
    return parsed


def _keys(parsed: Any) -> int:
    """How many keys it has; not those under a tensor's data, where none may be."""
    count, left = 0, [parsed] if isinstance(parsed, dict | list) else []
    while left:
        part = left.pop()
        if isinstance(part, dict):
            count += len(part)
            left += [
                value
                for key, value in part.items()
                if isinstance(value, dict) or (isinstance(value, list) and key != "data")
            ]
        else:
            left += [value for value in part if isinstance(value, dict | list)]
    return count


def _compare(text: bytes) -> None:
    try:
        json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise BadRequest("the JSON is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise BadRequest(f"the JSON names {key[:40]!r} twice in one object")
        seen.add(key)
