"""Rows that do not parse any more: written by an earlier release with other rules, or by hand.

Whoever reads one says so of its subject, with the reason, and goes on with the others.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from weighbridge import limits
from weighbridge.registry.errors import Conflict, RegistryError, broken_rules
from weighbridge.storage.errors import StorageError

Kind = TypeVar("Kind", bound=BaseModel)

BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What reading such a row raises where nobody expected it."""


class Unreadable(Conflict, ValueError):
    """What is stored of `what` breaks a rule of this release; the message names the fields."""

    code = "unreadable"

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"what is stored of {what} cannot be read: {why}")
        self.what = what


def is_unreadable(exc: BaseException) -> bool:
    """Whether this, one of BROKEN, came of a row; not of what the registry or a store says on purpose."""
    return isinstance(exc, Unreadable) or not isinstance(exc, RegistryError | StorageError)


def parse(kind: type[Kind], value: Any, what: str) -> Kind:
    """The value of a JSON column. Raises Unreadable."""
    try:
        return kind.model_validate(value)
    except ValidationError as exc:
        raise Unreadable(what, broken_rules(exc)) from exc


def labels(text: str) -> dict[str, str]:
    """The labels of a fleet as a row names it. Raises Unreadable."""
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise Unreadable("a fleet's labels", limits.quoted(text)) from exc
    if not isinstance(found, dict):
        raise Unreadable("a fleet's labels", limits.quoted(text))
    return {str(key): str(value) for key, value in found.items()}
