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
from weighbridge.storage.errors import DigestMismatch, StorageError, StorageFull, StorageUnavailable
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.local_cache import BlobCache

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


def test_blobs_of_a_folder_are_copied_and_verified(cache: BlobCache, tmp_path: Path) -> None:
    """Whoever writes to the store's folder cannot change what was verified: no inode is shared."""
    blobs = Blobs(FolderStore(tmp_path / "store", create=True))
    blobs.put_bytes(DATA)
    theirs = tmp_path / "store" / blobs.key(DIGEST)
    ours = cache.ensure_from(blobs, DIGEST)
    assert ours.is_relative_to(cache.folder)
    assert ours.stat().st_ino != theirs.stat().st_ino
    theirs.write_bytes(b"evil" * (len(DATA) // 4))
    assert cache.ensure_from(blobs, DIGEST).read_bytes() == DATA


@pytest.mark.parametrize("how", ["same size", "shorter", "longer", "link", "pipe", "folder", "gone"])
def test_a_swapped_blob_is_never_taken(cache: BlobCache, tmp_path: Path, how: str) -> None:
    """Whatever lies there in its place: an error names it, and nothing is left to be believed later."""
    root = tmp_path / "store"
    blobs = Blobs(FolderStore(root, create=True))
    blobs.put_bytes(DATA)
    place = root / blobs.key(DIGEST)
    place.unlink()
    (tmp_path / "evil").write_bytes(bytes(len(DATA)))
    match how:
        case "same size":
            place.write_bytes(bytes(len(DATA)))
        case "shorter":
            place.write_bytes(DATA[:-1])
        case "longer":
            place.write_bytes(DATA + b"x")
        case "link":
            place.symlink_to(tmp_path / "evil")
        case "pipe":
            os.mkfifo(place)
        case "folder":
            place.mkdir()
    with pytest.raises(StorageError, match=DIGEST):
        cache.ensure_from(blobs, DIGEST)
    with pytest.raises(LookupError):
        cache.path(DIGEST)
    if how != "folder":
        place.unlink(missing_ok=True)
        blobs.put_bytes(DATA)
        assert cache.ensure_from(blobs, DIGEST).read_bytes() == DATA


def test_no_more_is_taken_than_a_blob_has(cache: BlobCache) -> None:
    """One that grew for ever would fill the disk before its digest is known to be wrong."""

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return len(buffer)

    with pytest.raises(DigestMismatch):
        cache.ensure(DIGEST, lambda start: Endless(), size=len(DATA))  # type: ignore[arg-type,return-value]


def test_a_blob_larger_than_the_disk_is_refused_before_a_byte_is_written(cache: BlobCache, tmp_path: Path) -> None:
    """A sparse file costs its writer nothing."""
    blobs = Blobs(FolderStore(tmp_path / "store", create=True))
    place = tmp_path / "store" / blobs.key(DIGEST)
    place.parent.mkdir(parents=True)
    with place.open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(StorageFull, match="left"):
        cache.ensure_from(blobs, DIGEST)
    assert not list(cache.folder.glob("partial/*"))


def test_a_cache_that_others_could_write_to_is_closed_and_believes_nothing(tmp_path: Path) -> None:
    """What does not hash to its name goes, whatever it is; the rest stays; from then on nobody else gets in."""
    folder = tmp_path / "cache"
    other = blake3(b"other").hexdigest()
    linked = blake3(b"linked").hexdigest()
    for digest, data in ((DIGEST, DATA), (other, b"evil!")):
        (folder / digest[:2]).mkdir(parents=True, exist_ok=True)
        (folder / digest[:2] / digest).write_bytes(data)
    (folder / linked[:2]).mkdir(exist_ok=True)
    (tmp_path / "evil").write_bytes(b"linked")
    (folder / linked[:2] / linked).symlink_to(tmp_path / "evil")
    folder.chmod(0o777)
    cache = BlobCache(folder)
    assert cache.ensure(other, lambda start: io.BytesIO(b"other"[start:])).read_bytes() == b"other"
    assert cache.path(DIGEST).read_bytes() == DATA
    assert {blob.digest for blob in cache.list()} == {DIGEST, other}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_cache_without_syncs_is_hashed_once_by_each_process(tmp_path: Path) -> None:
    """A name may outlive its bytes in a power cut; once hashed, the same inode with the same times is believed."""
    BlobCache(tmp_path, durable=False).ensure(DIGEST, lambda start: io.BytesIO(DATA[start:]))
    path = tmp_path / DIGEST[:2] / DIGEST
    cache = BlobCache(tmp_path, durable=False)
    assert cache.path(DIGEST) == path
    path.chmod(0o600)
    path.write_bytes(bytes(len(DATA)))
    with pytest.raises(LookupError):
        cache.path(DIGEST)
    assert cache.ensure(DIGEST, lambda start: io.BytesIO(DATA[start:])).read_bytes() == DATA
