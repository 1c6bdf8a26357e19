"""Files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from weighbridge.storage.keys import TEMPORARY

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@contextmanager
def new_file(target: Path, *, replace: bool = True, durable: bool = True, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `target` for writing; on success it becomes `target`, on failure it vanishes.

    It has `mode`, less the umask, from the start. With `durable` the bytes and the name survive a power cut. Raises
    FileExistsError when `replace` is False and `target` exists, and whatever OSError writing brings.
    """
    temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if replace:
            temporary.replace(target)
        else:
            _rename_noreplace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if durable:
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the file system can (SMB and some FUSE cannot)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _rename_noreplace(source: Path, target: Path) -> None:
    """Rename unless `target` exists.

    renameat2 does it in one step. A link and an unlink, the portable way, change the file's ctime once more after
    it appeared, which a reader who pinned it in between would take for new content.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return _link(source, target)
    if renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return None
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return _link(source, target)
    raise OSError(code, os.strerror(code), str(target))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EPERM):
            raise
        # No links either (exFAT, object stores as folders): the name is taken by an empty file, then by the whole one.
        target.open("xb").close()
        source.replace(target)
    else:
        source.unlink()
