"""Whether somebody has a file open for writing: the kernel refuses a read lease while one does."""

from __future__ import annotations

import errno
import fcntl
import os
import signal

_CANNOT_TELL = {errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def has_writer(descriptor: int) -> bool | None:
    """Say whether the file behind a read-only descriptor is open for writing; None where nobody can tell."""
    try:
        # A writer that comes while we hold the lease breaks it, and the kernel tells us so by a signal: SIGIO, which
        # kills a process that does not expect it. SIGURG is ignored by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        if error.errno in _CANNOT_TELL:
            return None
        raise
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def file_has_writer(path: str | os.PathLike[str]) -> bool | None:
    """The same for a path. Raises OSError where it cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return has_writer(descriptor)
    finally:
        os.close(descriptor)
