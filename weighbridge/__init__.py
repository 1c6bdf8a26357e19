"""Weighbridge: a checkpoint dropped into storage is weighed, and then it rolls.

`Client` and `publish` load on first use (PEP 562), so that `import weighbridge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Client", "__version__", "publish"]

if TYPE_CHECKING:
    from weighbridge.publishing import publish as publish
    from weighbridge.registry.client import Client as Client

_LAZY = {"Client": "weighbridge.registry.client", "publish": "weighbridge.publishing"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
