"""Bring an artifact here: its manifest and every blob that it names, through the registry, by digest, verified."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

from weighbridge.engines.blobs import read_manifest
from weighbridge.engines.errors import LoadError
from weighbridge.engines.manifest import Manifest
from weighbridge.registry.client import Client
from weighbridge.storage.local_cache import BlobCache
from weighbridge.storage.streaming import Progress

_MANIFEST = 256 << 20
"""Bytes of a manifest, at most."""


class _Stream(io.RawIOBase):
    """An iterator of bytes as a readable file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            try:
                self._rest = memoryview(next(self._chunks))
            except StopIteration:
                return 0
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def close(self) -> None:
        """Close the connection that the bytes came from."""
        if not self.closed and (close := getattr(self._chunks, "close", None)):
            close()
        super().close()


def pull(client: Client, cache: BlobCache, artifact: str, *, progress: Progress | None = None) -> Manifest:
    """Fetch what is not in the cache yet; return the manifest. Broken downloads go on where they ended.

    Raises RegistryError, DigestMismatch, StorageFull, and LoadError for a manifest of another release.
    """

    def opened(digest: str, start: int) -> IO[bytes]:
        return io.BufferedReader(_Stream(client.stream_blob(digest, start)), 1 << 20)

    def fetch(digest: str, size: int) -> None:
        cache.ensure(digest, lambda start: opened(digest, start), size=size if size >= 0 else None, progress=progress)

    fetch(artifact, _MANIFEST)
    manifest = manifest_of(cache, artifact)
    if manifest is None:
        raise LoadError(f"artifact {artifact}: its manifest is of a form that this release does not know")
    for digest, size in manifest.blobs().items():
        fetch(digest, size)
    return manifest


def manifest_of(cache: BlobCache, artifact: str) -> Manifest | None:
    """The manifest of an artifact, as far as it is here and this release knows its form."""
    try:
        return read_manifest(cache.path, artifact)
    except (LookupError, FileNotFoundError, LoadError):
        return None
