"""Objects as files under one folder of this machine."""

from __future__ import annotations

import io
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from weighbridge.storage import disk_errors, lease, walk
from weighbridge.storage.atomic import new_file
from weighbridge.storage.errors import (
    BucketNotFound,
    InvalidKey,
    NotSupported,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
)
from weighbridge.storage.keys import check_key, check_prefix
from weighbridge.storage.listing import check_folder, objects_of
from weighbridge.storage.optional import OptionalCall
from weighbridge.storage.protocols import Entry, ObjectInfo, PassedOver, Ref
from weighbridge.storage.streaming import check_range, chunks

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class FolderStore:
    """The files under `root`; storage.walk has the rule about links.

    With `create` the root is made when it is missing; otherwise a missing root is BucketNotFound, also later on: a
    folder that was unmounted must not be taken for an empty one. `durable` syncs every put to the disk. `used` is
    the folder in it that this process may be limited to: `check` asks for nothing else.
    """

    def __init__(self, root: Path | str, *, create: bool = False, durable: bool = True, used: str = "") -> None:
        self.root = Path(os.path.abspath(root))
        self._used = used.strip("/")
        self._durable = durable
        self._leases = OptionalCall(
            str(self.root), "see who has a file open for writing", without="files must be quiet for a while instead"
        )
        if create:
            with self._errors(None):
                self.root.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return self.root.as_uri()

    @property
    def optional(self) -> Sequence[OptionalCall]:
        return (self._leases,)

    def check(self) -> None:
        self._real_root()
        with self._errors(None), suppress(FileNotFoundError):
            os.scandir(self.root / self._used).close()

    def free_bytes(self) -> int:
        """What is free on the disk for one without privileges."""
        with self._errors(None):
            return shutil.disk_usage(self.root).free

    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        with self.open(key, start=start, end=end, if_match=if_match) as stream:
            return stream.read()

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        check_range(start, end)
        file = self._open(key)
        try:
            info = walk.describe(key, os.fstat(file.fileno()))
            if if_match is not None and info.etag != if_match.etag:
                raise PreconditionFailed(f"{key} is no longer the content that was pinned", key=key)
            file.seek(start)
            stop = info.size if end is None else min(end, info.size)
            return io.BufferedReader(_FileRange(file, info, max(0, stop - start)), 1 << 17)
        except BaseException:
            file.close()
            raise

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with self._errors(key):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ObjectNotFound(f"{self.url} has no object {key}: it is no regular file", key=key)
        return walk.describe(key, status)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        return objects_of(self.survey(prefix))

    def survey(self, prefix: str = "") -> Iterator[ObjectInfo | PassedOver]:
        self._real_root()
        return walk.survey(self.root, prefix)

    def find(self, key: str) -> ObjectInfo | PassedOver | None:
        self._real_root()
        return walk.find(self.root, check_key(key))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        check_folder(prefix)
        self._real_root()
        for found in walk.level(self.root, prefix.removesuffix("/")):
            if isinstance(found, str):
                yield Entry(found, None)
            elif isinstance(found, ObjectInfo):
                yield Entry(found.key, found)
            elif found.error is not None:
                raise found.error

    def put(self, key: str, data: bytes | IO[bytes] | Path, *, if_none_match: bool = False) -> ObjectInfo:
        if isinstance(data, Path):
            with data.open("rb") as source:
                return self.put(key, source, if_none_match=if_none_match)
        with self._new(key, replace=not if_none_match) as file:
            if isinstance(data, bytes | bytearray | memoryview):
                file.write(data)
            else:
                for chunk in chunks(data):
                    file.write(chunk)
        return self.head(key)

    def copy(self, source: Ref, key: str) -> ObjectInfo:
        # Never a hard link: writing to either file would change both.
        with self.open(source.key, if_match=source) as stream:
            return self.put(key, stream)

    def move(self, source: str, key: str) -> ObjectInfo:
        old, new = self._path(source), self._path(key)
        with self._errors(source):
            if not old.is_file():
                raise ObjectNotFound(f"{self.url} has no object {source}", key=source)
            self._make_folder(new.parent, key)
            old.replace(new)
        return self.head(key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors(key):
            path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path:
        return self._path(key)

    def has_writer(self, key: str) -> bool | None:
        return self._leases(partial(self._ask_lease, key), lambda: None)

    def _ask_lease(self, key: str) -> bool | None:
        with self._open(key) as file:
            writer = lease.has_writer(file.fileno())
        if writer is None:
            raise NotSupported(f"{key}: no lease on a remote file system, nor on another user's file", key=key)
        return writer

    def _path(self, key: str) -> Path:
        """The file of a key. Raises InvalidKey where links lead out of the root, BucketNotFound without a root."""
        root = self._real_root()
        path = self.root / check_key(key)
        if not walk.is_inside(root, key):
            raise InvalidKey(f"{key} leads out of {self.root} through a symbolic link", key=key)
        return path

    def _real_root(self) -> Path:
        if not self.root.is_dir():
            raise BucketNotFound(f"there is no folder {self.root}")
        return Path(os.path.realpath(self.root))

    def _open(self, key: str) -> io.FileIO:
        path = self._path(key)
        with self._errors(key):
            # Not blocking: opening a pipe must not hang us.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ObjectNotFound(f"{self.url} has no object {key}: it is no regular file", key=key)
            # The link may have moved between the look and the open; what was opened is what counts.
            if not Path(os.path.realpath(f"/proc/self/fd/{descriptor}")).is_relative_to(self._real_root()):
                raise InvalidKey(f"{key} leads out of {self.root} through a symbolic link", key=key)
        except BaseException:
            os.close(descriptor)
            raise
        return io.FileIO(descriptor)

    @contextmanager
    def _new(self, key: str, *, replace: bool) -> Iterator[IO[bytes]]:
        path = self._path(key)
        with self._errors(key):
            self._make_folder(path.parent, key)
            try:
                with new_file(path, replace=replace, durable=self._durable) as file:
                    yield file
            except FileExistsError as error:
                raise PreconditionFailed(f"{key} is already there", key=key) from error

    def _make_folder(self, folder: Path, key: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(f"{key}: a part of its path is a file in {self.root}", key=key) from error

    def _errors(self, key: str | None) -> AbstractContextManager[None]:
        return disk_errors.translated(self.root, key)


class _FileRange(io.RawIOBase):
    """`length` bytes of a file from where it stands; at their end it proves that the file did not change meanwhile."""

    def __init__(self, file: io.FileIO, info: ObjectInfo, length: int) -> None:
        self._file, self._info, self._left = file, info, length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")[: self._left]
        count = self._file.readinto(view) if len(view) else 0
        self._left -= count or 0
        if not count or not self._left:
            self._prove_unchanged()
        return count or 0

    def readall(self) -> bytes:
        buffer = bytearray(self._left)
        view, filled = memoryview(buffer), 0
        while count := self.readinto(view[filled:]):
            filled += count
        return bytes(view[:filled])

    def close(self) -> None:
        self._file.close()
        super().close()

    def _prove_unchanged(self) -> None:
        if walk.describe(self._info.key, os.fstat(self._file.fileno())).etag != self._info.etag:
            raise PreconditionFailed(f"{self._info.key} changed while it was read", key=self._info.key)
