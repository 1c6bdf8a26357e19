"""The worker's verified blobs on disk, kept below a size: what was used last stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

from weighbridge.storage.blobs import Blobs
from weighbridge.storage.local_cache import BlobCache

_IN_USE = 600.0
"""Seconds for which a blob that was asked for counts as in use, by whichever process of this machine."""


class WorkerCache:
    """Blobs of one store as local files; those of a folder on this machine are read in place."""

    def __init__(self, blobs: Blobs, folder: Path, limit: int) -> None:
        self._blobs, self._files, self._limit = blobs, BlobCache(folder), limit

    def path(self, digest: str) -> Path:
        """The verified file of a blob, fetched if need be. Raises ObjectNotFound, DigestMismatch, StorageError."""
        path = self._files.ensure_from(self._blobs, digest)
        if path.is_relative_to(self._files.folder):
            os.utime(path)
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
            return self._files.path(digest).stat().st_mtime
        except (LookupError, FileNotFoundError):
            return 0.0
