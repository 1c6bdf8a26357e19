"""Verified blobs as files of one folder, shared by every process of this machine."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from weighbridge.storage import disk_errors
from weighbridge.storage.atomic import sync_folder
from weighbridge.storage.blobs import Blob, Blobs, check_digest
from weighbridge.storage.errors import DigestMismatch
from weighbridge.storage.streaming import Progress, chunks, new_hasher

Opener = Callable[[int], IO[bytes]]
"""Opens a blob's bytes from an offset on; the stream is closed after use."""


class BlobCache:
    """`<folder>/<2 hex>/<digest>`: read-only files that were verified when they got their name.

    Downloads grow under `partial/`, one process at a time per blob (the others wait and find it done); one that was
    cut off is taken up again where it ended.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """The file of a blob that is here. Raises LookupError."""
        path = self._path(digest)
        if not path.is_file():
            raise LookupError(f"blob {digest} is not in {self.folder}")
        return path

    def ensure(self, digest: str, opener: Opener, *, progress: Progress | None = None) -> Path:
        """Return the file of a blob, downloading it if need be; `progress` counts resumed bytes too.

        Raises DigestMismatch (what came is thrown away), StorageFull, and what the opener raises (what came is kept).
        """
        path = self._path(digest)
        if path.is_file():
            return path
        with disk_errors.translated(self.folder, digest):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._partial(digest) as file:
                if not path.is_file():
                    self._download(file, digest, opener, progress)
                    self._partial_path(digest).rename(path)
                    path.chmod(0o444)
                    sync_folder(path.parent)
        return path

    def ensure_from(self, blobs: Blobs, digest: str, *, progress: Progress | None = None) -> Path:
        """The same from a store; a store that is a folder of this machine is read in place, without a copy."""
        if (local := blobs.local_path(digest)) is not None:
            return local
        return self.ensure(digest, lambda start: blobs.open(digest, start=start), progress=progress)

    def list(self) -> Iterator[Blob]:
        """Yield every blob that is here."""
        for path in sorted(self.folder.glob("[0-9a-f][0-9a-f]/*")):
            yield Blob(path.name, path.stat().st_size)

    def evict(self, keep: Collection[str]) -> int:
        """Remove all blobs and partial downloads but those in `keep`; return the bytes freed.

        Files in use stay readable for who has them open or mapped.
        """
        freed = 0
        for path in (*self.folder.glob("[0-9a-f][0-9a-f]/*"), *self.folder.glob("partial/*")):
            if path.name not in keep:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        return freed

    def _path(self, digest: str) -> Path:
        return self.folder / check_digest(digest)[:2] / digest

    def _partial_path(self, digest: str) -> Path:
        return self.folder / "partial" / digest

    @contextmanager
    def _partial(self, digest: str) -> Iterator[IO[bytes]]:
        """The partial file, locked: the lock goes with the process, however it ends."""
        path = self._partial_path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if _is_same(file, path) or self._path(digest).is_file():
                    yield file
                    break
            # Whoever had the lock threw the file away: take the new one.
        if self._path(digest).is_file():
            path.unlink(missing_ok=True)

    def _download(self, file: IO[bytes], digest: str, opener: Opener, progress: Progress | None) -> None:
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
        if (seen := hasher.hexdigest()) != digest:
            self._partial_path(digest).unlink()
            raise DigestMismatch(f"blob {digest} came as {seen}", expected=digest, seen=seen)
        file.flush()
        os.fsync(file.fileno())


def _is_same(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
