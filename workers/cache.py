"""The worker's verified blobs on disk, kept below a size: what was used last stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

from weighbridge.storage import private
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.in_place import InPlace
from weighbridge.storage.local_cache import BlobCache

_IN_USE = 600.0
"""Seconds for which a blob that was asked for counts as in use, by whichever process of this machine."""


class WorkerCache:
    """Blobs of one store as verified local files, copied into a folder of our own.

    `apart`: publishers do not write where the blobs are. A folder of this machine is then used in place, as far as its
    owners and modes say that nobody else can change it either.
    """

    def __init__(self, blobs: Blobs, folder: Path, limit: int, *, apart: bool = False) -> None:
        self._blobs, self._files, self._limit = blobs, BlobCache(folder, durable=False), limit
        self._in_place = InPlace(blobs) if apart and isinstance(blobs.store, FolderStore) else None

    def path(self, digest: str) -> Path:
        """The verified file of a blob, fetched if need be. Raises ObjectNotFound, DigestMismatch, StorageError."""
        if self._in_place is not None and private.is_out_of_reach(self._in_place.file(digest)):
            return self._in_place.path(digest)
        path = self._files.ensure_from(self._blobs, digest)
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # when it was written says which bytes it has
        return path

    def trim(self) -> int:
        """Remove what was not used for the longest time until the rest is within the limit; return the bytes freed."""
        used = sorted(((self._used(blob.digest), blob) for blob in self._files.list()), key=lambda one: -one[0])
        if sum(blob.size for _, blob in used) <= self._limit:
            return 0
        now, total, keep = time.time(), 0, set()
        for at, blob in used:
            total += blob.size
            if total <= self._limit or now - at < _IN_USE:
                keep.add(blob.digest)
        # Downloads under way lie in `partial/` under their digest.
        return self._files.evict(keep | {path.name for path in self._files.folder.glob("partial/*")})

    def _used(self, digest: str) -> float:
        try:
            return (self._files.folder / digest[:2] / digest).stat().st_atime
        except FileNotFoundError:
            return 0.0
