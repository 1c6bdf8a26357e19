"""Settings as the file that children read. The standard library reads TOML and does not write it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr


def dumps(settings: Mapping[str, Any]) -> str:
    """One `name = value` line each, groups as inline tables; None is left out. Secrets are written as they are."""
    return "".join(f"{_key(name)} = {_value(value)}\n" for name, value in settings.items() if value is not None)


def _value(value: Any) -> str:
    match value:
        case SecretStr():
            return _value(value.get_secret_value())
        case BaseModel():
            return _value(dict(value))
        case bool() | int() | float():
            return json.dumps(value)
        case str() | Path():
            # JSON's escapes are TOML's, but for DEL.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            inner = ", ".join(f"{_key(name)} = {_value(item)}" for name, item in value.items() if item is not None)
            return f"{{{inner}}}"
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"a {type(value).__name__} cannot be written as TOML")


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)
