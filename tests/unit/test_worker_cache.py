"""The worker's blob cache: bounded, and what was used last stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from weighbridge.storage.blobs import Blobs
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
