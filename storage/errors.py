"""What can go wrong with a store, said once: drivers translate foreign errors into these at their edge."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from weighbridge import limits


class StorageError(Exception):
    """The root of every error a store raises. `key` names the object, or is None for the whole store.

    A message may quote what a file holds: it is cut.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(limits.cut(message))
        self.key = key


class ObjectNotFound(StorageError, LookupError):
    """No object has this key (or this version of it)."""


class ObjectArchived(StorageError):
    """The object is in an archive (S3 Glacier) and must be restored before it can be read."""


class PreconditionFailed(StorageError):
    """An If-Match or If-None-Match condition did not hold: the object changed, or is already there."""


class InvalidKey(StorageError, ValueError):
    """The key is empty, absolute, or has a `.`, `..`, backslash or NUL part."""


class AccessDenied(StorageError, PermissionError):
    """The store refused the credentials, or they do not allow this call. Retrying cures nothing.

    `permission` is the right that is missing (`s3:GetObject`); None: the credentials themselves were refused, or the
    store (a folder) has no name for it.
    """

    def __init__(self, message: str, *, key: str | None = None, permission: str | None = None) -> None:
        super().__init__(message, key=key)
        self.permission = permission


class NotSupported(StorageError):
    """The store does not know this call, or this condition of it. Retrying cures nothing."""


class EmptyRange(StorageError):
    """A range begins behind the end of the object: there is nothing to read."""


class BucketNotFound(StorageError, LookupError):
    """The bucket or the root folder does not exist (any more)."""


class StorageFull(StorageError):
    """No space left, or over quota."""


class StorageUnavailable(StorageError, ConnectionError):
    """The store could not be reached or answered 5xx or 429 after the driver's own retries. Retrying may cure it."""


class DigestMismatch(StorageError):
    """The bytes are not those that the digest names. `expected` and `seen` are BLAKE3 in hex."""

    def __init__(self, message: str, *, expected: str, seen: str, key: str | None = None) -> None:
        super().__init__(message, key=key)
        self.expected, self.seen = expected, seen

    def __reduce__(self) -> tuple[Callable[[str], DigestMismatch], tuple[str]]:
        """A confined child is told of it."""
        return partial(DigestMismatch, expected=self.expected, seen=self.seen, key=self.key), (str(self),)


class AlreadyPublished(StorageError, FileExistsError):
    """A checkpoint with this model and name is there already, complete; published checkpoints are never rewritten."""


class InvalidName(StorageError, ValueError):
    """A model's or checkpoint's name breaks the rules; the message says which."""


class NotPublishable(InvalidName):
    """What was to be published is no checkpoint, and nothing was sent; the message names the file and the rule."""


class MissingDependency(StorageError, ImportError):
    """An optional package is not installed; the message names the extra to install."""
