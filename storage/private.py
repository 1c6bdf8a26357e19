"""Files and folders of this user alone: made with their mode from the start, and refused where others could reach them.

What does not belong here: what is in them.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

from weighbridge.storage.atomic import new_file
from weighbridge.storage.errors import StorageError

log = logging.getLogger(__name__)

_OTHERS = 0o077
_OTHERS_WRITE = 0o022


class NotPrivate(StorageError, PermissionError):
    """A file or folder that holds secrets is a link, somebody else's, or open to others; the message says which."""


def make_folder(folder: Path) -> Path:
    """Make a folder of mode 0700 with its parents; close one that is there and ours. Raises NotPrivate, OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise NotPrivate(f"{folder} belongs to {_owner(found)}: choose a folder of your own")
        if found.st_mode & _OTHERS:
            os.fchmod(descriptor, 0o700)
            log.info("%s is closed to other users now (mode 0700): secrets lie in it", folder)
    finally:
        os.close(descriptor)
    return folder


def close(path: Path) -> None:
    """Take a file or folder of this user's from everybody else (0600, 0700); nothing for a link and what is not there.

    By its name: to open and close a database's file would end the locks that this process has on it.
    """
    try:
        found = path.lstat()
    except OSError:
        return
    if found.st_uid == os.geteuid() and found.st_mode & _OTHERS and not stat.S_ISLNK(found.st_mode):
        path.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS)


def close_all(folder: Path) -> None:
    """`close` a folder and all within it; links are not followed."""
    close(folder)
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            close(Path(at, name))


def begin(path: Path) -> None:
    """Have an empty file of mode 0600 there, for who opens it by name; one that is there is closed to others.

    A folder that is missing is left to who opens the file to say.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError:
        close(path)


def is_ours(path: Path) -> bool:
    """Whether a file, folder or socket is no link, belongs to this user, and nobody else may write to it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(found.st_mode) and _is_safe(found)


def claim_folder(folder: Path) -> bool:
    """Make a folder of mode 0700 where others may have made one of its name; whether what is there is ours alone.

    Unlike `make_folder` it changes nothing that is there, and follows no link: in /tmp it may be anybody's.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS


def is_folder_ours(folder: Path) -> bool:
    """As `is_ours`, for the folder that a path leads to."""
    try:
        found = folder.stat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and _is_safe(found)


def is_out_of_reach(file: Path) -> bool:
    """Whether only we and root can change or exchange a file: by owner and mode, its own and of all above.

    A hard link elsewhere is another way to it. In a folder like /tmp the sticky bit keeps others from renaming ours.
    """
    real = Path(os.path.realpath(file))
    found = real.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or not _is_trusted(found):
        return False
    return all(_is_trusted(folder.stat(), sticky=True) for folder in real.parents)


def write(path: Path, data: bytes) -> None:
    """Put a file of mode 0600 in place, whole. What is there is replaced, a link too, and never followed."""
    with new_file(path, mode=0o600) as file:
        file.write(data)


def read(path: Path) -> bytes | None:
    """The bytes of a file that only this user can read or change; None where there is none. Raises NotPrivate."""
    try:
        # Not waiting for a writer, should somebody have put a pipe there.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotPrivate(f"{path} is a link: a file of secrets never is; remove it") from error
        raise
    with open(descriptor, "rb") as file:
        _prove_private(path, os.fstat(descriptor))
        return file.read()


def _prove_private(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise NotPrivate(f"{path} is no file: remove it")
    if found.st_uid != os.geteuid():
        raise NotPrivate(f"{path} belongs to {_owner(found)}, who knows what is in it: remove it")
    if found.st_mode & _OTHERS:
        raise NotPrivate(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: other users can read or change it, so what is in it "
            "is no secret any more; remove it, and a new one is made"
        )


def _is_safe(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE


def _owner(found: os.stat_result) -> str:
    return f"user {found.st_uid}"


def _is_trusted(found: os.stat_result, *, sticky: bool = False) -> bool:
    open_to_others = found.st_mode & _OTHERS_WRITE and not (sticky and found.st_mode & stat.S_ISVTX)
    return found.st_uid in (0, os.geteuid()) and not open_to_others
