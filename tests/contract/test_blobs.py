"""Blobs by digest, on every store."""

from __future__ import annotations

import io
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from blake3 import blake3

from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import DigestMismatch, ObjectNotFound, PreconditionFailed
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import Store

DATA = os.urandom(1 << 20) * 6 + b"end"
DIGEST = blake3(DATA).hexdigest()


@pytest.fixture
def blobs(any_store: Store) -> Blobs:
    return Blobs(any_store, "artifacts")


def test_content_has_one_name_however_it_comes(blobs: Blobs, tmp_path: Path) -> None:
    """Bytes, a file, a stream and a pinned object of another store become the same blob, stored once."""
    source = MemoryStore()
    ref = pin(source.put("digits/a.safetensors", DATA))
    (tmp_path / "file").write_bytes(DATA)
    seen: list[int] = []
    first = blobs.adopt(source, ref, progress=seen.append)
    info = blobs.store.head(f"artifacts/blobs/{DIGEST[:2]}/{DIGEST}")
    assert (first.digest, first.size, sum(seen)) == (DIGEST, len(DATA), len(DATA))
    assert blobs.put_bytes(DATA) == blobs.put_file(tmp_path / "file") == blobs.put_stream(io.BytesIO(DATA)) == first
    assert blobs.store.head(info.key) == info, "it was written again"
    assert list(blobs.list()) == [first]
    assert [i.key for i in blobs.store.list()] == [info.key], "something stayed in staging"
    assert blobs.get(DIGEST) == DATA
    assert (blobs.exists(DIGEST), blobs.exists("0" * 64), blobs.size(DIGEST)) == (True, False, len(DATA))


def test_fetch_verifies_and_appears_at_once(blobs: Blobs, tmp_path: Path) -> None:
    """A file is there whole and verified, or not at all."""
    blobs.put_bytes(DATA)
    seen: list[int] = []
    target = tmp_path / "deep" / "er" / "file"
    assert blobs.fetch(DIGEST, target, progress=seen.append).read_bytes() == DATA
    assert sum(seen) == len(DATA)
    blobs.store.put(blobs.key(DIGEST), DATA[:-1] + b"!")
    with pytest.raises(DigestMismatch, match=DIGEST) as caught:
        blobs.fetch(DIGEST, tmp_path / "other")
    assert caught.value.expected == DIGEST != caught.value.seen
    with pytest.raises(DigestMismatch):
        blobs.get(DIGEST)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "other"))] == []


def test_a_missing_blob_is_not_found_and_no_digest_is_an_error(blobs: Blobs, tmp_path: Path) -> None:
    """Only 64 lower-case hex digits can become a key."""
    with pytest.raises(ObjectNotFound):
        blobs.fetch("0" * 64, tmp_path / "x")
    for wrong in ("", "../" + "0" * 61, "A" * 64, "0" * 63, "0" * 64 + "\n"):
        with pytest.raises(ValueError, match="digest"):
            blobs.open(wrong)


def test_what_changed_is_not_adopted(blobs: Blobs) -> None:
    """Other content, or another size than was pinned, leaves no blob and nothing in staging."""
    source = MemoryStore()
    ref = pin(source.put("a", DATA))
    source.put("a", DATA)
    with pytest.raises(PreconditionFailed):
        blobs.adopt(source, ref)
    with pytest.raises(PreconditionFailed, match="not 5"):
        blobs.put_stream(io.BytesIO(b"four"), expected=5)
    assert list(blobs.store.list()) == []


def test_a_damaged_blob_is_written_anew(blobs: Blobs) -> None:
    """A blob of the wrong size is no reason not to store the right one."""
    blobs.store.put(blobs.key(DIGEST), b"damaged")
    assert blobs.put_bytes(DATA).digest == DIGEST
    assert blobs.get(DIGEST) == DATA


def test_what_crashed_writers_left_is_swept(blobs: Blobs) -> None:
    """Staging of before a time goes; younger stays, blobs stay."""
    blobs.put_bytes(b"blob")
    left = blobs.store.put("artifacts/staging/1", b"x")
    assert blobs.sweep_staging(before=left.modified - timedelta(seconds=1)) == 0
    assert blobs.sweep_staging(before=datetime.now(UTC) + timedelta(seconds=2)) == 1
    assert [i.size for i in blobs.store.list()] == [4]
