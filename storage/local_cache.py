"""Verified blobs as files of one private folder, shared by every process of this machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from weighbridge.storage import disk_errors, private
from weighbridge.storage.atomic import sync_folder
from weighbridge.storage.blobs import Blob, Blobs, check_digest
from weighbridge.storage.errors import DigestMismatch, StorageFull
from weighbridge.storage.pins import DiskStamp
from weighbridge.storage.streaming import Progress, chunks, digest_file, new_hasher

Opener = Callable[[int], IO[bytes]]
"""Opens a blob's bytes from an offset on; the stream is closed after use."""
_HEX = "[0-9a-f][0-9a-f]"


class BlobCache:
    """`<folder>/<2 hex>/<digest>`: read-only files that were verified when they got their name.

    Downloads grow under `partial/`, one process at a time per blob (the others wait and find it done); one that was
    cut off is taken up again where it ended. The folder is closed to everybody else; what was in one that was open is
    verified again. Without `durable` nothing is synced: a name may outlive its bytes in a power cut, so each process
    hashes a file once before it believes the name.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder = folder
        self._durable = durable
        self._closed = False
        self._hashed: dict[str, DiskStamp] = {}

    def path(self, digest: str) -> Path:
        """The file of a blob that is here. Raises LookupError."""
        if not self._has(digest):
            raise LookupError(f"blob {digest} is not in {self.folder}")
        return self._path(digest)

    def ensure(self, digest: str, opener: Opener, *, size: int | None = None, progress: Progress | None = None) -> Path:
        """Return the file of a blob, downloading it if need be; `progress` counts resumed bytes too.

        `size`: the bytes that it has, where that is known; no more are taken. Raises DigestMismatch (what came is
        thrown away), StorageFull, NotPrivate for a folder of somebody else, and what the opener raises (what came is
        kept).
        """
        self._close()
        path = self._path(digest)
        if self._has(digest):
            return path
        with disk_errors.translated(self.folder, digest):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with self._partial(digest) as file:
                if not self._has(digest):
                    self._download(file, digest, opener, size, progress)
                    self._take(file, digest)
        return path

    def ensure_from(self, blobs: Blobs, digest: str, *, progress: Progress | None = None) -> Path:
        """The same from a store. Raises ObjectNotFound, and StorageFull before a byte is written."""
        self._close()
        if self._has(digest):
            return self._path(digest)
        size = blobs.size(digest)
        if size > (free := shutil.disk_usage(self.folder).free):
            raise StorageFull(f"blob {digest} has {size:,} bytes; {self.folder} has {free:,} left", key=digest)
        return self.ensure(digest, lambda start: blobs.open(digest, start=start), progress=progress)

    def list(self) -> Iterator[Blob]:
        """Yield every blob that is here."""
        for path in sorted(self.folder.glob(f"{_HEX}/*")):
            yield Blob(path.name, path.stat().st_size)

    def evict(self, keep: Collection[str]) -> int:
        """Remove all blobs and partial downloads but those in `keep`; return the bytes freed.

        Files in use stay readable for who has them open or mapped.
        """
        freed = 0
        for path in (*self.folder.glob(f"{_HEX}/*"), *self.folder.glob("partial/*")):
            if path.name not in keep:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        return freed

    def _path(self, digest: str) -> Path:
        return self.folder / check_digest(digest)[:2] / digest

    def _partial_path(self, digest: str) -> Path:
        return self.folder / "partial" / digest

    def _has(self, digest: str) -> bool:
        """Whether a file is here under its digest; of a folder without syncs, also whether its bytes are."""
        path = self._path(digest)
        try:
            found = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        stamp = _stamp(found)
        if not stat.S_ISREG(found.st_mode):
            return False
        if self._durable or self._hashed.get(digest) == stamp:
            return True
        if digest_file(path) != digest:
            path.unlink(missing_ok=True)
            return False
        self._hashed[digest] = stamp
        return True

    def _close(self) -> None:
        """Make the folder ours alone, once; throw away what somebody else may have put there."""
        if self._closed:
            return
        was_open = self.folder.exists() and not private.is_folder_ours(self.folder)
        private.make_folder(self.folder)
        if was_open:
            for part in (*self.folder.glob(_HEX), self.folder / "partial"):
                if part.is_symlink():
                    part.unlink()
                elif part.is_dir() and (part.stat().st_uid != os.geteuid() or part.name == "partial"):
                    shutil.rmtree(part)
            for path in self.folder.glob(f"{_HEX}/*"):
                path.parent.chmod(0o700)
                if path.is_symlink() or not path.is_file() or digest_file(path) != path.name:
                    path.unlink(missing_ok=True)
        self._closed = True

    def _take(self, file: IO[bytes], digest: str) -> None:
        """Give what came its name."""
        file.flush()
        if self._durable:
            os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o444)
        path = self._path(digest)
        self._partial_path(digest).rename(path)
        if self._durable:
            sync_folder(path.parent)
        self._hashed[digest] = _stamp(os.fstat(file.fileno()))

    @contextmanager
    def _partial(self, digest: str) -> Iterator[IO[bytes]]:
        """The partial file, locked: the lock goes with the process, however it ends."""
        path = self._partial_path(digest)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        while True:
            with path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _is_same(file, path) or self._path(digest).is_file():
                    yield file
                    break
            # Whoever had the lock threw the file away: take the new one.
        if self._path(digest).is_file():
            path.unlink(missing_ok=True)

    def _download(
        self, file: IO[bytes], digest: str, opener: Opener, size: int | None, progress: Progress | None
    ) -> None:
        hasher = new_hasher()
        file.seek(0)
        for chunk in chunks(file):
            hasher.update(chunk)
            if progress is not None:
                progress(len(chunk))
        if hasher.hexdigest() != digest:  # not cut off just before it got its name
            with opener(file.tell()) as stream:
                for chunk in chunks(stream):
                    file.write(chunk)
                    hasher.update(chunk)
                    if progress is not None:
                        progress(len(chunk))
                    if size is not None and file.tell() > size:
                        break  # it cannot become what it should be
        if (seen := hasher.hexdigest()) != digest:
            self._partial_path(digest).unlink()
            raise DigestMismatch(f"blob {digest} came as {seen}", expected=digest, seen=seen)


def _is_same(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _stamp(found: os.stat_result) -> DiskStamp:
    return DiskStamp(found.st_ino, found.st_size, found.st_mtime_ns)
