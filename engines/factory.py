"""Find a factory by reference. Only for trusted code: an operator's file, or an installed module on the allow-list."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from weighbridge.engines.errors import LoadError

if TYPE_CHECKING:
    from torch import nn

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def load_factory(reference: str) -> Callable[[], nn.Module]:
    """Return the callable of `package.module:factory` or `path/to/file.py:factory`; this runs the module's code.

    Raises LoadError naming what is not there.
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not name.isidentifier():
        raise LoadError(f"{reference}: write package.module:factory or path/to/file.py:factory")
    module = _from_file(Path(where), reference) if where.endswith(".py") else _from_name(where, reference)
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise LoadError(f"{reference}: {where} has no callable {name}")
    return cast("Callable[[], nn.Module]", found)


def allowed_factory(reference: str, allowed: Sequence[str]) -> Callable[[], nn.Module]:
    """The same for a reference from an untrusted place: an installed module, matched by a pattern of the operator."""
    module, _, _ = reference.rpartition(":")
    if not _MODULE.fullmatch(module) or not any(fnmatchcase(reference, pattern) for pattern in allowed):
        patterns = ", ".join(allowed) or "none"
        raise LoadError(f"factory {reference} is not allowed by the operator (allowed: {patterns})")
    return load_factory(reference)


def make(reference: str, allowed: Sequence[str]) -> nn.Module:
    """Call an allowed factory. Raises LoadError, also for whatever its own code raises."""
    factory = allowed_factory(reference, allowed)
    try:
        return factory()
    except Exception as exc:
        raise LoadError(f"factory {reference} failed: {type(exc).__name__}: {exc}") from exc


def _from_name(name: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as exc:  # whatever the module's own code raises
        raise LoadError(f"{reference}: {type(exc).__name__}: {exc}") from exc


def _from_file(path: Path, reference: str) -> ModuleType:
    if not path.is_file():
        raise LoadError(f"{reference}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_weighbridge_factory_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{reference}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look there
    try:
        spec.loader.exec_module(module)
    except Exception as exc:
        raise LoadError(f"{reference}: {type(exc).__name__}: {exc}") from exc
    return module
