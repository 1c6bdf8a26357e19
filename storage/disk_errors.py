"""The operating system's errors about files, translated once into ours."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weighbridge.storage.errors import (
    AccessDenied,
    BucketNotFound,
    InvalidKey,
    ObjectNotFound,
    StorageError,
    StorageFull,
    StorageUnavailable,
)


@contextmanager
def translated(root: Path, key: str | None = None) -> Iterator[None]:
    """Raise a StorageError for every OSError within; `root` and `key` name what was asked for.

    One without a number is no file's: a caller's own error (a registry that is away is a ConnectionError) passes.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno is None:
            raise
        raise of_os_error(error, root, key) from error


def of_os_error(error: OSError, root: Path, key: str | None) -> StorageError:
    """What an OSError means for `key` (None: for all) under the folder `root`."""
    what = f"{root}: {key}" if key else str(root)
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR if key and root.is_dir():
            return ObjectNotFound(f"{root.as_uri()} has no object {key}", key=key)
        case errno.ENOENT:
            return BucketNotFound(f"there is no folder {root}", key=key)
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return StorageFull(f"{what}: {reason}; free some space and try again", key=key)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return AccessDenied(f"{what}: {reason}", key=key)
        case errno.ENAMETOOLONG | errno.ELOOP:
            return InvalidKey(f"{what}: {reason}", key=key)
        case errno.EISDIR | errno.EEXIST | errno.ENOTEMPTY:
            return StorageError(f"{what}: a folder and a file cannot have one name ({reason})", key=key)
        case _:
            return StorageUnavailable(f"{what}: {reason}", key=key)
