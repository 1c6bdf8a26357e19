"""Whether somebody has a file open for writing: the kernel refuses a read lease while one does."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import signal

_REMOTE = frozenset(
    {0x6969, 0x517B, 0xFF534D42, 0xFE534D42, 0x5346414F, 0x6B414653, 0x00C36400, 0x0BD00BD0, 0x01021997, 0x47504653}
)
"""Kinds of file systems (statfs's f_type) whose writers may be on other machines: NFS, SMB, CIFS, SMB2, AFS (twice),
Ceph, Lustre, 9p, GPFS. NFS and SMB refuse a lease as if there were a writer, for want of a delegation."""


def has_writer(descriptor: int) -> bool | None:
    """Say whether the file behind a read-only descriptor is open for writing; None where nobody can tell."""
    if _is_remote(descriptor):
        return None
    try:
        # A writer that comes while we hold the lease breaks it, and the kernel tells us so by a signal: SIGIO, which
        # kills a process that does not expect it. SIGURG is ignored by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        # Whatever else it is (no leases here, not our file), it does not say that there is a writer, nor that none is.
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _is_remote(descriptor: int) -> bool:
    return _kind(descriptor) in _REMOTE


def _kind(descriptor: int) -> int:
    """The kind of file system that a descriptor's file lies in; 0 where the C library does not say."""
    answer = (ctypes.c_long * 64)()  # more than any platform's struct statfs, whose first field it is
    try:
        failed = ctypes.CDLL(None).fstatfs(descriptor, ctypes.byref(answer))
    except AttributeError:
        return 0
    return 0 if failed else answer[0] & 0xFFFFFFFF
