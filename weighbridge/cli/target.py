"""Which registry a command talks to: the one that is named, the one of the data folder at hand, or the configured one.

Two `weighbridge up` on one machine are two sites: a command given in the folder of one must not reach the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weighbridge.registry.errors import NotFound
from weighbridge.registry.local import Local, around, of

if TYPE_CHECKING:
    from weighbridge.settings import Loaded

URL, DATA = ("registry", "url"), ("data",)
_NAMED = ("flag", "environment")
"""Origins of what was said for this command or this shell, rather than written down once."""


@dataclass(frozen=True, slots=True)
class Target:
    """A registry: its URL, and the data folder by which it is reached if it is this user's own. `note`: what to say."""

    url: str
    data: Path | None = None
    note: str = ""


def choose(loaded: Loaded, folder: Path) -> Target:
    """The registry that a command in `folder` means. Raises NotFound for a data folder without one, NotPrivate."""
    settings = loaded.settings
    local = of(settings.data.absolute()) if DATA in loaded.origins else around(folder)
    if _was_named(loaded, URL):
        return Target(settings.registry_url, note=_instead(local, settings.registry_url))
    if local is not None:
        return Target(local.url, local.data, f"talking to {local.url}, the registry of {local.data}")
    if loaded.origins.get(DATA) == "flag":
        raise NotFound("registry in the data folder", settings.data)
    return Target(settings.registry_url)


def _was_named(loaded: Loaded, path: tuple[str, ...]) -> bool:
    return loaded.origins.get(path, "").startswith(_NAMED)


def _instead(local: Local | None, url: str) -> str:
    if local is None or url.rstrip("/") in local.urls:
        return ""
    return f"talking to {url}, not to the registry of {local.data} ({local.url})"
