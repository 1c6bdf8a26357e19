"""Ports of a machine's own servers: the wished one, a free one when that is busy, the same again at the next start."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path


class Ports:
    """Remembers in a JSON file which port each server got."""

    def __init__(self, file: Path, *, patience: float = 2.0) -> None:
        self._file, self._patience = file, patience
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
        for port in (remembered, wished, 0):
            if port is not None and (port == 0 or self._is_free(port, host)):
                found = port or _free(host)
                self._taken.add(found)
                self._remembered[name] = found
                self._file.write_text(json.dumps(self._remembered, indent=1))
                return found
        raise AssertionError("port 0 is always possible")

    def _is_free(self, port: int, host: str) -> bool:
        return port not in self._taken and _can_bind(host, port)


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
