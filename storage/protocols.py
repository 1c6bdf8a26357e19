"""The verbs of a store, one protocol each; ask for the verb you need: `def digest(store: Get, ref: Ref) -> str`.

Keys are `/`-separated, relative, without empty, `.` or `..` parts. Sizes and offsets are bytes. Every driver
(`memory`, `folder`, `s3`) passes `tests/contract/test_store.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from weighbridge.storage.errors import StorageError
from weighbridge.storage.optional import OptionalCall


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as the store describes it.

    `etag` identifies the content well enough for If-Match: an S3 ETag without quotes, or for a folder
    `inode-size-mtime_ns-ctime_ns`. `version_id` is None where it is unknown (listings do not say).
    `modified` is timezone-aware.
    """

    key: str
    size: int
    etag: str
    modified: datetime
    version_id: str | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """An object pinned to one content: reads through it fail with PreconditionFailed once the content is another."""

    key: str
    size: int
    etag: str
    version_id: str | None = None
    modified: str = ""
    """ISO 8601, informative and part of the identity where there is no version id."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a delimited listing: an object, or a common prefix (`info` is None, `key` ends in `/`)."""

    key: str
    info: ObjectInfo | None


@dataclass(frozen=True, slots=True)
class PassedOver:
    """What a listing met and cannot yield: an unreadable folder, a link that leads out, no valid key.

    `key` is for people (storage.keys.shown) and ends in `/` where everything below is meant. `error` is what the store
    answered where it could not look; without one nothing failed, and the thing is just no object.
    """

    key: str
    reason: str
    error: StorageError | None = None


class Get(Protocol):
    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        """Return bytes [start, end) of the object (end None: to its end), fewer where the object ends sooner.

        Raises ObjectNotFound, PreconditionFailed when `if_match` names other content, ValueError for start < 0
        or end < start.
        """
        ...

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        """Open bytes [start, end) as a readable, closable stream with `readinto`, for objects too large for `get`.

        Never a mix of two contents: what is read is what was opened, or PreconditionFailed at the latest at its end.
        """
        ...


class Head(Protocol):
    def head(self, key: str) -> ObjectInfo:
        """Describe one object. Raises ObjectNotFound."""
        ...


class List(Protocol):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix`, all of a `/`-folder together, lazily, page by page."""
        ...

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield one level under `prefix` (which is empty or ends in `/`): objects and common prefixes.

        A folder on disk also yields its empty folders.
        """
        ...


class Survey(Protocol):
    def survey(self, prefix: str = "") -> Iterator[ObjectInfo | PassedOver]:
        """Yield what `list` yields, and what it passes over; a part that cannot be listed ends nothing.

        Any text may be the prefix, also the start of an invalid key. Raises only what concerns the whole store.
        """
        ...

    def find(self, key: str) -> ObjectInfo | PassedOver | None:
        """Describe one object exactly as a listing does, without listing what lies beside it; None: it is not there."""
        ...


class Put(Protocol):
    def put(self, key: str, data: bytes | IO[bytes] | Path, *, if_none_match: bool = False) -> ObjectInfo:
        """Store an object, whole or not at all: no reader ever sees a part of it.

        With `if_none_match`, raises PreconditionFailed when the key already exists. Raises StorageFull.
        """
        ...


class Copy(Protocol):
    def copy(self, source: Ref, key: str) -> ObjectInfo:
        """Copy pinned content to `key` within the store, server-side where it can. Raises PreconditionFailed."""
        ...


class Delete(Protocol):
    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...


@runtime_checkable
class LocalPath(Protocol):
    """A store whose objects are files on this machine: readers may open (and map) them directly."""

    def local_path(self, key: str) -> Path: ...


@runtime_checkable
class Presign(Protocol):
    def presign(self, key: str, *, expires: int) -> str:
        """Return a URL that reads the object for `expires` seconds without further credentials."""
        ...


@runtime_checkable
class OpenWriter(Protocol):
    def has_writer(self, key: str) -> bool | None:
        """Say whether some process has the object open for writing just now; None where nobody can tell.

        (Leases need a local file system, and the file's owner or CAP_LEASE.)
        """
        ...


@runtime_checkable
class OpenUploads(Protocol):
    def uploads(self, prefix: str) -> Sequence[str] | None:
        """Return the keys under `prefix` with an unfinished multipart upload; None where nobody can tell.

        (The keys may not list them, or the store does not. An object is there whole or not at all even so.)
        """
        ...


@runtime_checkable
class Parts(Protocol):
    """A store that takes large objects in parts, by calls of their own."""

    def put_in_parts(self, key: str, data: bytes, *, if_none_match: bool = False) -> ObjectInfo:
        """As `put`, in parts however few bytes there are: to try those calls."""
        ...

    def unfinished(self, key: str) -> AbstractContextManager[None]:
        """An upload of `key` in parts that is begun and, at the end, aborted: what is seen of it meanwhile?"""
        ...


@runtime_checkable
class Degrading(Protocol):
    """A store that gets along without some of its calls."""

    @property
    def optional(self) -> Sequence[OptionalCall]:
        """The calls that can be done without."""
        ...


@runtime_checkable
class Space(Protocol):
    """A store on a disk of this machine, which can be full."""

    def free_bytes(self) -> int:
        """Bytes that this process may still write there."""
        ...


@runtime_checkable
class Move(Protocol):
    """A store that renames without moving bytes."""

    def move(self, source: str, key: str) -> ObjectInfo:
        """Rename `source` to `key`, replacing what is there. Raises ObjectNotFound."""
        ...


class Check(Protocol):
    def check(self) -> None:
        """Prove that the store answers where it is used. Raises AccessDenied, BucketNotFound or StorageUnavailable."""
        ...


class Store(Get, Head, List, Survey, Put, Copy, Delete, Check, Protocol):
    """All verbs together: what `open_store` returns."""

    @property
    def url(self) -> str:
        """Where the store is, without secrets: `s3://bucket/prefix`, `file:///path`, `memory://name`."""
        ...
