"""Where a unix socket may lie: its path has at most 107 bytes, and in a URL only plain characters."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from weighbridge.registry.errors import Invalid
from weighbridge.storage import private

_LONGEST = 100


def socket_path(data: Path, environment: Mapping[str, str] = os.environ, *, name: str = "valkey/valkey.sock") -> Path:
    """Where a server of a data folder listens: in it, or where its path is too long in a private folder elsewhere.

    The same folder has the same socket at each start. Raises Invalid where no folder of this machine will do.
    """
    if fits(path := data / name):
        return path
    short = hashlib.sha256(os.fsencode(path)).hexdigest()[:16] + ".sock"
    return private_folder(environment, short) / short


def private_folder(environment: Mapping[str, str] = os.environ, name: str = "x" * 32) -> Path:
    """A folder of this user alone (0700) in which a socket `name` has a short path. Raises Invalid."""
    bases = (environment.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp", "/var/tmp")
    for base in filter(os.path.isabs, bases):
        folder = Path(base) / f"weighbridge-{os.getuid()}"
        if fits(folder / name) and private.claim_folder(folder):
            return folder
    raise Invalid(
        f"no folder for a unix socket: {', '.join(filter(None, bases))} have long paths or belong to somebody else; "
        "set XDG_RUNTIME_DIR to a short folder of your own, or broker.url to a Redis or Valkey"
    )


def can_connect(path: Path) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def fits(path: Path) -> bool:
    """Whether a socket may have this path, and a URL name it."""
    return len(os.fsencode(path)) <= _LONGEST and re.fullmatch(r"[\w./-]+", str(path), re.ASCII) is not None
