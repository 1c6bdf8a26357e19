"""The unix socket in the data folder by which a registry answers this user's own commands and hosts."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from weighbridge.registry import local
from weighbridge.registry.local import Local
from weighbridge.storage import private

logger = logging.getLogger(__name__)


@dataclass
class OwnSocket:
    """A socket that is listened on, and what was said of it."""

    data: Path
    path: Path
    sock: socket.socket
    said: Local | None = field(default=None)

    def announce(self, url: str, bound: str, host: str) -> None:
        """Tell this user's commands: `url` is the registry's own, `bound` that of its port, listening on `host`."""
        urls = dict.fromkeys((url, bound, *local.loopback_urls(bound, host)))
        self.said = Local(self.data, tuple(urls), self.path)
        local.announce(self.said)

    def withdraw(self) -> None:
        """From here on the address may be somebody else's."""
        if self.said is not None:
            local.withdraw(self.said)


@contextlib.contextmanager
def own_socket(data: Path, path: Path | None) -> Iterator[OwnSocket | None]:
    """Bind the socket of a data folder; None where another registry has it, or none can be made: both are said."""
    path = path or data / "registry.sock"
    with contextlib.ExitStack() as parts:
        try:
            parts.enter_context(_the_only_one(data))
            sock = parts.enter_context(_bound(path))
        except OSError as error:
            logger.warning("no socket at %s (%s): commands on this machine need WEIGHBRIDGE_TOKEN", path, error)
            yield None
        else:
            yield OwnSocket(data, path, sock)


@contextlib.contextmanager
def _the_only_one(data: Path) -> Iterator[None]:
    """Hold the data folder's lock. Raises BlockingIOError while another registry does."""
    descriptor = os.open(data / "registry.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """Bound, and gone in the end; what a killed registry left there is taken away. Raises OSError."""
    private.make_folder(path.parent)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        try:
            os.chmod(path, 0o600)
            yield sock
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
