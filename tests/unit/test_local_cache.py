"""The cache of verified blobs that the processes of a machine share."""

from __future__ import annotations

import errno
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest
from blake3 import blake3

from weighbridge.storage import local_cache
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import DigestMismatch, StorageFull, StorageUnavailable
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.local_cache import BlobCache
from weighbridge.storage.memory import MemoryStore

DATA = os.urandom(3 << 20)
DIGEST = blake3(DATA).hexdigest()


@pytest.fixture
def cache(tmp_path: Path) -> BlobCache:
    return BlobCache(tmp_path / "cache")


def test_a_blob_is_downloaded_once(cache: BlobCache) -> None:
    """The first call downloads, later ones find it; the file cannot be written."""
    offsets: list[int] = []

    def opener(start: int) -> IO[bytes]:
        offsets.append(start)
        return io.BytesIO(DATA[start:])

    with pytest.raises(LookupError):
        cache.path(DIGEST)
    path = cache.ensure(DIGEST, opener)
    assert path.read_bytes() == DATA
    assert cache.ensure(DIGEST, opener) == cache.path(DIGEST) == path
    assert offsets == [0]
    assert path.stat().st_mode & 0o222 == 0
    assert not list((cache.folder / "partial").iterdir())


def test_a_cut_off_download_is_taken_up_again(cache: BlobCache) -> None:
    """What came before the connection broke is not asked for twice; progress counts every byte once per try."""

    class Breaking(io.BytesIO):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            if self.tell() >= 1 << 20:
                raise StorageUnavailable("the connection broke")
            return super().readinto(buffer[: 1 << 20])

    with pytest.raises(StorageUnavailable):
        cache.ensure(DIGEST, lambda start: Breaking(DATA[start:]))
    seen: list[int] = []
    offsets: list[int] = []
    cache.ensure(DIGEST, lambda start: (offsets.append(start), io.BytesIO(DATA[start:]))[1], progress=seen.append)
    assert (offsets, sum(seen)) == ([1 << 20], len(DATA))
    assert cache.path(DIGEST).read_bytes() == DATA


def test_wrong_bytes_are_thrown_away(cache: BlobCache) -> None:
    """A digest that does not match leaves nothing to resume from; the next try starts at zero."""
    with pytest.raises(DigestMismatch, match=DIGEST):
        cache.ensure(DIGEST, lambda start: io.BytesIO(b"wrong"))
    assert cache.ensure(DIGEST, lambda start: io.BytesIO(DATA[start:])).read_bytes() == DATA


def test_many_at_once_download_once(cache: BlobCache) -> None:
    """Eight callers: one downloads, the others wait for it and get the same file."""
    downloads: list[int] = []
    ready = threading.Barrier(8)

    def opener(start: int) -> IO[bytes]:
        downloads.append(start)
        return io.BytesIO(DATA[start:])

    def ensure(_: int) -> Path:
        ready.wait(10)
        return cache.ensure(DIGEST, opener)

    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(ensure, range(8)))
    assert (len(paths), downloads) == (1, [0])


def test_after_a_wrong_download_the_waiting_caller_starts_anew(cache: BlobCache) -> None:
    """Whoever waited for a download that was thrown away does not write into the deleted file."""
    begun, go_on = threading.Event(), threading.Event()

    def wrong(start: int) -> IO[bytes]:
        begun.set()
        assert go_on.wait(10)
        return io.BytesIO(b"wrong")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.ensure, DIGEST, wrong)
        assert begun.wait(10)
        second = pool.submit(cache.ensure, DIGEST, lambda start: io.BytesIO(DATA[start:]))
        go_on.set()
        with pytest.raises(DigestMismatch):
            first.result(10)
        assert second.result(10).read_bytes() == DATA


def test_a_full_disk_says_so_and_nothing_half_is_used(cache: BlobCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC becomes StorageFull with advice; when there is space again the download goes on."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(local_cache.os, "fsync", full)
        with pytest.raises(StorageFull, match="free some space"):
            cache.ensure(DIGEST, lambda start: io.BytesIO(DATA[start:]))
    with pytest.raises(LookupError):
        cache.path(DIGEST)
    assert cache.ensure(DIGEST, lambda start: io.BytesIO(DATA[start:])).read_bytes() == DATA


def test_what_the_opener_raises_comes_as_it_is(cache: BlobCache) -> None:
    """A registry that is away is a ConnectionError: no disk of ours is at fault, and nobody may think so."""
    away = ConnectionError("no answer from the registry")

    def opener(start: int) -> IO[bytes]:
        raise away

    with pytest.raises(ConnectionError) as caught:
        cache.ensure(DIGEST, opener)
    assert caught.value is away


def test_evict_keeps_what_is_needed(cache: BlobCache) -> None:
    """All other blobs and partial downloads go, and the freed bytes are told."""
    other = blake3(b"other").hexdigest()
    cache.ensure(DIGEST, lambda start: io.BytesIO(DATA[start:]))
    cache.ensure(other, lambda start: io.BytesIO(b"other"[start:]))
    (cache.folder / "partial" / ("0" * 64)).write_bytes(b"part")
    with cache.path(other).open("rb") as reader:
        assert cache.evict({DIGEST}) == 9
        assert reader.read() == b"other"
    assert [blob.digest for blob in cache.list()] == [DIGEST]


def test_blobs_of_a_folder_are_used_in_place(cache: BlobCache, tmp_path: Path) -> None:
    """No copy from a folder of this machine; from any other store there is one."""
    local = Blobs(FolderStore(tmp_path / "store", create=True))
    local.put_bytes(DATA)
    assert cache.ensure_from(local, DIGEST).is_relative_to(tmp_path / "store")
    remote = Blobs(MemoryStore())
    remote.put_bytes(DATA)
    assert cache.ensure_from(remote, DIGEST) == cache.path(DIGEST)
