"""Blobs of a folder on this machine, verified and used where they lie, for folders that nobody else writes to."""

from __future__ import annotations

import os
from pathlib import Path

from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import DigestMismatch
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.pins import disk_etag
from weighbridge.storage.streaming import digest_file


class InPlace:
    """Each file is hashed once per inode, size and times, by the process that uses it.

    Between the hash and the use somebody who writes there could exchange it: for such folders there is
    `local_cache.BlobCache`, which takes a copy.
    """

    def __init__(self, blobs: Blobs) -> None:
        """Raises TypeError for blobs that are no files of this machine."""
        if not isinstance(blobs.store, FolderStore):
            raise TypeError(f"{blobs.store.url} is no folder of this machine")
        self._blobs, self._store = blobs, blobs.store
        self._hashed: dict[str, str] = {}

    @classmethod
    def of(cls, folder: Path) -> InPlace:
        """Those of the folder that holds `blobs/`. Raises StorageError."""
        return cls(Blobs(FolderStore(folder)))

    def file(self, digest: str) -> Path:
        """The regular file of a blob, not looked into. Raises ObjectNotFound."""
        key = self._blobs.key(digest)
        self._store.head(key)
        return Path(os.path.realpath(self._store.local_path(key)))

    def path(self, digest: str) -> Path:
        """The verified file of a blob. Raises ObjectNotFound, DigestMismatch."""
        key, path = self._blobs.key(digest), self.file(digest)
        etag = disk_etag(path.stat())
        if self._hashed.get(digest) != etag:
            if (seen := digest_file(path)) != digest:
                raise DigestMismatch(f"{path} has the digest {seen}", expected=digest, seen=seen, key=key)
            self._hashed[digest] = etag
        return path
