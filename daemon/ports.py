"""Ports of a machine's own servers: the wished one, a free one when that is busy, the same again at the next start."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from weighbridge.storage import private


class Ports:
    """Remembers in a JSON file which port each server got.

    `shared`: a folder of all who choose ports for this user. A port that one has chosen is no other's while it lives,
    though its server listens only later.
    """

    def __init__(self, file: Path, *, patience: float = 2.0, shared: Path | None = None) -> None:
        self._file, self._patience, self._shared = file, patience, shared
        self._remembered = _read(file)
        self._taken: dict[int, int | None] = {}
        """Ports that were chosen, with the descriptor that locks each for its process's life."""

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
                self._file.write_text(json.dumps(self._remembered, indent=1))
                return found
        raise OSError(f"no port of {host} is free")

    def _take(self, port: int) -> bool:
        """Whether nobody else has chosen it; without a folder to ask in nobody can tell."""
        if port in self._taken:
            return False
        descriptor = None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            if self._shared is not None:
                descriptor = os.open(private.make_folder(self._shared) / str(port), os.O_RDWR | os.O_CREAT, 0o600)
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
        self._taken[port] = descriptor
        return True

    def _is_free(self, port: int, host: str) -> bool:
        return port not in self._taken and _can_bind(host, port)


_TRIES = 20
"""Free ports that somebody else may have chosen a moment ago."""


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
