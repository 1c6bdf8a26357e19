"""The worker's blob cache: bounded, and what was used last stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import DigestMismatch
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore
from weighbridge.workers.cache import WorkerCache


def test_the_oldest_leave_first(tmp_path: Path) -> None:
    """Above the limit the least recently used are removed, but none that may be in use."""
    blobs = Blobs(MemoryStore("cache"))
    cache = WorkerCache(blobs, tmp_path, limit=250)
    names = [blobs.put_bytes(bytes([index]) * 100).digest for index in range(4)]
    paths = [cache.path(name) for name in names]
    assert cache.trim() == 0, "all four are in use"
    for age, path in zip((4000, 1000, 3000, 2000), paths, strict=True):
        os.utime(path, (time.time() - age,) * 2)
    assert cache.trim() == 200
    assert [path.exists() for path in paths] == [False, True, False, True]
    assert cache.path(names[0]).read_bytes() == bytes(100), "what left comes again"


def test_a_blob_that_is_nowhere(tmp_path: Path) -> None:
    """It is a LookupError, as the engines expect."""
    with pytest.raises(LookupError):
        WorkerCache(Blobs(MemoryStore("empty")), tmp_path, limit=1).path("0" * 64)


@pytest.mark.parametrize("reach", ["nobody's", "the file", "a folder above", "a link"])
def test_only_what_nobody_else_can_change_is_used_in_place(tmp_path: Path, reach: str) -> None:
    """By owner and mode, of the file and all above it: else, and where publishers write, a worker takes a copy."""
    store = tmp_path / "store"
    blobs = Blobs(FolderStore(store, create=True))
    digest = blobs.put_bytes(b"weights").digest
    place = store / blobs.key(digest)
    store.chmod(0o700)
    match reach:
        case "the file":
            place.chmod(0o666)
        case "a folder above":
            store.chmod(0o777)
        case "a link":
            os.link(place, tmp_path / "another way to it")
    used = WorkerCache(blobs, tmp_path / "cache", 1 << 20, apart=True).path(digest)
    assert used.read_bytes() == b"weights"
    assert used.is_relative_to(store) == (reach == "nobody's")
    watched = WorkerCache(blobs, tmp_path / "another", 1 << 20).path(digest)
    assert watched.is_relative_to(tmp_path / "another")


def test_a_blob_in_place_is_hashed_again_when_it_changed(tmp_path: Path) -> None:
    """In place or not, other bytes are never used, even of the same size and date."""
    blobs = Blobs(FolderStore(tmp_path / "store", create=True))
    digest = blobs.put_bytes(b"weights").digest
    place = tmp_path / "store" / blobs.key(digest)
    cache = WorkerCache(blobs, tmp_path / "cache", 1 << 20, apart=True)
    before = cache.path(digest).stat()
    place.write_bytes(b"evilest")
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DigestMismatch):
        cache.path(digest)
