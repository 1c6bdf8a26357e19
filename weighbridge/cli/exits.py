"""Exit codes, and which error means which: an error of ours is also a builtin one that says what it means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

from weighbridge.terminal import is_expected


class Exit(IntEnum):
    """Scripts may rely on these; docs/operations.md explains them."""

    OK = 0
    FAILED = 1
    """It failed, or the answer is no: a version was rejected, the doctor found something."""
    USAGE = 2
    """Wrong arguments or settings."""
    NOT_FOUND = 3
    REFUSED = 4
    """Not allowed, or the state does not allow it."""
    UNAVAILABLE = 5
    """The registry, the store, the broker or the database does not answer; trying again may help."""
    INTERRUPTED = 130


class Failed(Exception):
    """A command's own negative answer, as one line for stderr."""

    def __init__(self, message: str, code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Imports of what an extra installs. Raises Failed, naming the extra, where something is missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").startswith("weighbridge"):
            raise
        raise Failed(f"{exc.name} is not installed: pip install 'weighbridge[{extra}]'", Exit.USAGE) from exc


def code_of(error: BaseException) -> Exit:
    """The exit code that an exception means. Order matters: PermissionError and ConnectionError are OSErrors."""
    from weighbridge.settings import ConfigError

    match error:
        case Failed():
            return error.code
        case KeyboardInterrupt():
            return Exit.INTERRUPTED
        case ConfigError():
            return Exit.USAGE
        case PermissionError() | FileExistsError():
            return Exit.REFUSED
        case ConnectionError() | TimeoutError():
            return Exit.UNAVAILABLE
        case FileNotFoundError() | LookupError():
            return Exit.NOT_FOUND
    status = getattr(error, "status", None)
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    # A rule about a value that the user gave: a name, a URL, a broker without a password.
    return Exit.USAGE if isinstance(error, ValueError) and is_expected(error) else Exit.FAILED


_BY_STATUS = {404: Exit.NOT_FOUND, 409: Exit.REFUSED, 412: Exit.REFUSED, 422: Exit.REFUSED, 503: Exit.UNAVAILABLE}
