"""The types of columns that hold text and JSON: bounded before SQL, so that SQLite and PostgreSQL answer alike.

SQLite takes any length, a NUL character and an infinity; PostgreSQL refuses all three, in the middle of a transaction.
"""

from __future__ import annotations

import json
import math
from typing import Any

from sqlalchemy import ColumnElement, Dialect, String, Text, TypeDecorator, func
from sqlalchemy.types import TypeEngine

from weighbridge import limits
from weighbridge.registry.errors import Invalid


class Named(TypeDecorator[str]):
    """Text that identifies something: refused where it is too long or cannot be stored. Raises Invalid."""

    impl = String
    cache_ok = True

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is not None:
            _check(value, self.most)
        return value

    def coerce_compared_value(self, op: Any, value: Any) -> TypeEngine[Any]:
        """What is looked for may be anything: it is not there."""
        return String()


class Exact(TypeDecorator[str]):
    """Text that somebody wrote and wants back as it is: refused where it is too long. Raises Invalid."""

    impl = Text
    cache_ok = True

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is not None:
            _check(value, self.most)
        return value


class Prose(TypeDecorator[str]):
    """Reasons and notes, which quote what others wrote: cut, with a mark, and never the reason for a failure."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else limits.prose(value)

    def column_expression(self, column: ColumnElement[str]) -> ColumnElement[str]:
        """Rows of before there were limits may hold megabytes: no more than a limit is ever fetched."""
        return func.substr(column, 1, limits.REASON + 1, type_=self)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else limits.cut(value)


def dumps(value: Any) -> str:
    """JSON for a column. What is no number of JSON is written as its name in words, as both databases keep it."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_without_infinities(value), allow_nan=False)


def loads(text: str | bytes) -> Any:
    """What `dumps` wrote, or an earlier release: what is no number of JSON reads as none at all."""
    return json.loads(text, parse_constant=lambda _: None)


def _check(value: str, most: int) -> None:
    if len(value) > most:
        raise Invalid(f"{limits.quoted(value)}: at most {most} characters")
    if not limits.is_storable(value):
        raise Invalid(f"{limits.quoted(value)} holds a NUL character or half of a surrogate pair")


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _without_infinities(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(one) for one in value]
    return value
