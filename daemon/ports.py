"""Ports of a machine's own servers: the wished one, a free one when that is busy, the same again at the next start."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from weighbridge.storage import private

log = logging.getLogger(__name__)


class Ports:
    """Remembers in a JSON file which port each server got.

    `shared`: a file of all processes that choose ports for this user. A port that one has chosen is no other's while
    that one lives, though its server listens only later.
    """

    def __init__(self, file: Path, *, patience: float = 2.0, shared: Path | None = None) -> None:
        self._file, self._patience = file, patience
        self._shared_file, self._shared = shared, _open(shared) if shared is not None else None
        self._remembered = _read(file)
        self._taken: set[int] = set()

    def choose(self, name: str, wished: int, host: str = "127.0.0.1") -> int:
        """Return the port remembered for `name`, else `wished` (0: any), else a free one; remember it.

        A remembered port that is busy is waited for, for a moment: it may be our own server of before that is ending.
        """
        remembered = self._remembered.get(name)
        deadline = time.monotonic() + self._patience
        while remembered and not self._is_free(remembered, host) and time.monotonic() < deadline:
            time.sleep(0.05)
        for port in (remembered, wished, *(0,) * _TRIES):
            if port is not None and (port == 0 or self._is_free(port, host)):
                found = port or _free(host)
                if not self._take(found):
                    continue
                self._remembered[name] = found
                private.write(self._file, json.dumps(self._remembered, indent=1).encode())
                return found
        raise OSError(f"no port of {host} is free")

    def _take(self, port: int) -> bool:
        """Whether no other process has chosen it; without a file to ask in nobody can tell."""
        if port in self._taken:
            return False
        if self._shared is not None:
            try:
                fcntl.lockf(self._shared, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            except (BlockingIOError, PermissionError):
                return False
            except OSError as error:
                words = "%s cannot be locked (%s): another `weighbridge up` may choose the same port"
                log.warning(words, self._shared_file, error)
        self._taken.add(port)
        return True

    def _is_free(self, port: int, host: str) -> bool:
        return port not in self._taken and _can_bind(host, port)


_TRIES = 20
"""Free ports that somebody else may have chosen a moment ago."""


def _open(shared: Path) -> int | None:
    """A byte of it stands for each port; open for as long as the process lives. None where there can be none."""
    try:
        return os.open(private.make_folder(shared.parent) / shared.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _read(file: Path) -> dict[str, int]:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {name: port for name, port in data.items() if isinstance(port, int) and 0 < port < 65536}


def _can_bind(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError:
        return False
    return True


def _free(host: str) -> int:
    with socket.create_server((host, 0), family=_family(host)) as server:
        return int(server.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
