"""The registries of this user on this machine: found by their address or their data folder, called by their socket.

A data folder (0700) holds what its registry leaves there: `registry.json` (where it answers), `registry.token` (an
administrator's, 0600), and a unix socket. `$XDG_STATE_HOME/weighbridge/registries/` (0700) maps addresses to folders.

A token that is found here is only ever sent by the socket. A port is anybody's: as soon as a registry ends another user
can listen there, and would be handed the token by every command and by every client that connects again. A socket in a
folder of this user is this user's, at every connection, and the kernel sees to it.

What does not belong here: SQL, and which tokens there are (registry.admission).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

from weighbridge.registry.errors import Unavailable
from weighbridge.storage import private
from weighbridge.storage.private import NotPrivate

log = logging.getLogger(__name__)

DATA: Final = "weighbridge-data"
"""The data folder's name where nobody chose another."""
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Local:
    """A registry of this user: its data folder, the URLs it answers at (the first is its own), and its socket."""

    data: Path
    urls: tuple[str, ...]
    socket: Path

    @property
    def url(self) -> str:
        return self.urls[0]

    def token(self) -> str:
        """The administrator's token that the registry left. Raises NotPrivate, Unavailable where there is none."""
        found = read_token(self.data)
        if found is None:
            raise Unavailable(f"{token_file(self.data)} is not there: start the registry of this folder again")
        return found


def token_file(data: Path) -> Path:
    return data / "registry.token"


def read_token(data: Path) -> str | None:
    """The token in a data folder, None where there is none. Raises NotPrivate."""
    found = private.read(token_file(data))
    return found.decode("utf-8", "replace").strip() if found else None


def of(data: Path) -> Local | None:
    """The registry that last ran on a data folder, whether it runs now or not. Raises NotPrivate."""
    file = _state_file(data)
    if not file.is_file():
        return None
    if not private.is_folder_ours(data):
        raise NotPrivate(f"{data} is not this user's alone: what is in it about a registry is not believed")
    found = private.read(file)
    try:
        state = json.loads(found or b"")
        return Local(data, tuple(state["urls"]), Path(state["socket"]))
    except (ValueError, KeyError, TypeError):
        return None  # it is written anew at the next start


def find(url: str) -> Local | None:
    """The registry of this user that answers at an address, or did until it was killed. Raises NotPrivate."""
    wanted = address(url)
    try:
        data = private.read(_index() / quote(wanted, safe=""))
    except OSError:
        return None
    found = of(Path(os.fsdecode(data))) if data else None
    # The folder may have another registry by now: its word counts, not the index's.
    return found if found and wanted in _addresses(found.urls) else None


def around(folder: Path) -> Local | None:
    """The registry of the data folder that `folder` is, or that lies in it or in a folder above; the nearest.

    Folders that other users could have put there are passed over.
    """
    for above in (folder, *folder.parents):
        for data in (above, above / DATA):
            with contextlib.suppress(NotPrivate):
                if (found := of(data)) is not None:
                    return found
    return None


def announce(local: Local) -> None:
    """Say in the data folder and in the index where a registry answers. Raises OSError for the data folder's part."""
    state = {"urls": local.urls, "socket": str(local.socket)}
    private.write(_state_file(local.data), json.dumps(state, indent=1).encode())
    try:
        index = private.make_folder(_index())
        for wanted in _addresses(local.urls):
            private.write(index / quote(wanted, safe=""), os.fsencode(local.data))
    except OSError as error:
        log.info("this registry is in no index (%s): commands find it from its folder, or by --data", error)


def withdraw(local: Local) -> None:
    """Take a registry that ends out of the index. The data folder still tells that there was one."""
    for wanted in _addresses(local.urls):
        with contextlib.suppress(OSError):
            entry = _index() / quote(wanted, safe="")
            if private.read(entry) == os.fsencode(local.data):
                entry.unlink()


def loopback_urls(url: str, host: str) -> Iterator[str]:
    """The other names of this machine that a server at `url`, listening on `host`, answers to."""
    parts = urlsplit(url)
    names = {"0.0.0.0": ("127.0.0.1", "localhost"), "::": ("127.0.0.1", "[::1]", "localhost")}.get(host)
    if names is None:
        names = ("localhost",) if is_loopback(host) else ()
    yield from (f"{parts.scheme}://{name}:{parts.port}" for name in names)


def address(url: str) -> str:
    """`HOST:PORT` of a URL, as the index names it."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    with contextlib.suppress(ValueError):
        host = str(ipaddress.ip_address(host))
    return f"{host}:{parts.port or _PORTS.get(parts.scheme, 0)}"


def is_loopback(host: str) -> bool:
    """Say whether an address, or a name to listen on, can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _addresses(urls: Iterable[str]) -> list[str]:
    """Of what lies at the root of its server: below a proxy's path the socket would be asked for other paths."""
    return [address(url) for url in urls if urlsplit(url).path in ("", "/")]


def _state_file(data: Path) -> Path:
    return data / "registry.json"


def _index() -> Path:
    return state_folder() / "registries"


def state_folder() -> Path:
    """Where this user's registries on this machine know of each other. Raises FileNotFoundError without a home."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = state if os.path.isabs(state) else os.path.expanduser("~/.local/state")
    if not os.path.isabs(base):
        raise FileNotFoundError("this user has no home; set XDG_STATE_HOME")
    return Path(base) / "weighbridge"
