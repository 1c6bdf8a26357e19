"""Content-addressed bytes in a store: `<prefix>blobs/<2 hex>/<digest>`, where the digest is BLAKE3 in hex.

A blob, once there, never changes; but nobody believes that of the store. Who acts on a blob hashes it: `get` and
`fetch` do, files to be mapped come from `local_cache` or `in_place`. What is still being written lies under
`<prefix>staging/` and is nobody's blob.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from weighbridge.storage import disk_errors
from weighbridge.storage.atomic import new_file
from weighbridge.storage.errors import DigestMismatch, InvalidName, ObjectNotFound, PreconditionFailed, StorageFull
from weighbridge.storage.optional import OptionalCall
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import Get, Move, Ref, Space, Store
from weighbridge.storage.streaming import DigestingReader, Progress, chunks, digest_bytes, digest_file

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Blob:
    """The name and size (bytes) of some content."""

    digest: str
    size: int


class Keep(Protocol):
    """The verbs of what only adds blobs."""

    def put_bytes(self, data: bytes) -> Blob:
        """Store bytes, once."""
        ...

    def put_file(self, path: Path) -> Blob:
        """Store a file that nobody changes meanwhile, once."""
        ...


class Blobs:
    """The blobs of one store under one prefix. As thread-safe as the store."""

    def __init__(self, store: Store, prefix: str = "") -> None:
        self.store = store
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._cleaning = OptionalCall(
            store.url, "delete what was staged", without="it stays and takes space", permission="s3:DeleteObject"
        )
        self._whole: dict[str, str] = {}
        """{digest: the ETag of what had it when it was read}."""

    def key(self, digest: str) -> str:
        """Where a blob lies in the store. Raises ValueError for what is no digest."""
        return f"{self._prefix}blobs/{check_digest(digest)[:2]}/{digest}"

    def size(self, digest: str) -> int:
        """Bytes of a blob. Raises ObjectNotFound."""
        return self.store.head(self.key(digest)).size

    def exists(self, digest: str) -> bool:
        try:
            self.size(digest)
        except ObjectNotFound:
            return False
        return True

    def put_bytes(self, data: bytes) -> Blob:
        """Store bytes, once."""
        blob = Blob(digest_bytes(data), len(data))
        self._put_once(blob, data)
        return blob

    def put_file(self, path: Path) -> Blob:
        """Store a file that nobody changes meanwhile, once: it is digested first, and sent only if it is new."""
        blob = Blob(digest_file(path), path.stat().st_size)
        self._put_once(blob, path)
        return blob

    def put_stream(self, stream: IO[bytes], *, expected: int | None = None, progress: Progress | None = None) -> Blob:
        """Store a stream in one pass: it is digested on the way into staging, and then takes its name.

        Raises PreconditionFailed when it has not the `expected` number of bytes.
        """
        staging = f"{self._prefix}staging/{uuid.uuid4().hex}"
        reader = DigestingReader(stream, size=expected, progress=progress)
        try:
            written = self.store.put(staging, reader)  # type: ignore[arg-type]
            blob = Blob(reader.digest, reader.size)
            if expected is not None and blob.size != expected:
                raise PreconditionFailed(f"the stream had {blob.size:,} bytes, not {expected:,}")
            if not self._is_whole(blob):
                self._name(pin(written), blob)
        finally:
            self._cleaning(partial(self.store.delete, staging), lambda: None)
        return blob

    def require_space(self, size: int, reserve: int) -> None:
        """Raise StorageFull where `size` bytes more would leave less than `reserve` free, if the store can tell."""
        if isinstance(self.store, Space) and (free := self.store.free_bytes()) < size + reserve:
            raise StorageFull(
                f"{self.store.url}: {size:,} bytes are to be written, {free:,} are free, and {reserve:,} are to stay "
                "free: free some space"
            )

    def adopt(self, source: Get, ref: Ref, *, progress: Progress | None = None) -> Blob:
        """Copy pinned content of any store into a blob, in one pass.

        Raises PreconditionFailed when it is no longer what was pinned (other content, or another size).
        """
        with source.open(ref.key, if_match=ref) as stream:
            return self.put_stream(stream, expected=ref.size, progress=progress)

    def get(self, digest: str) -> bytes:
        """A small blob's bytes, verified. Raises ObjectNotFound, DigestMismatch."""
        data = self.store.get(self.key(digest))
        if (seen := digest_bytes(data)) != digest:
            raise _mismatch(self.key(digest), digest, seen)
        return data

    def verify(self, digest: str) -> None:
        """Read a blob, however large, for its digest. Raises ObjectNotFound, DigestMismatch, PreconditionFailed."""
        key = self.key(digest)
        if (seen := self._read(pin(self.store.head(key)))) != digest:
            raise _mismatch(key, digest, seen)

    def open(self, digest: str, *, start: int = 0, end: int | None = None) -> IO[bytes]:
        """Open a blob's bytes [start, end), unverified: who reads them to the end checks the digest."""
        return self.store.open(self.key(digest), start=start, end=end)

    def fetch(self, digest: str, path: Path, *, progress: Progress | None = None) -> Path:
        """Copy a blob to a file that appears whole and verified, or not at all.

        Raises ObjectNotFound, DigestMismatch, StorageFull.
        """
        with self.open(digest) as stream, disk_errors.translated(path.parent, path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                reader = DigestingReader(stream, progress=progress)
                for chunk in chunks(reader):  # type: ignore[arg-type]
                    file.write(chunk)
                if reader.digest != digest:
                    raise _mismatch(self.key(digest), digest, reader.digest)
        return path

    def list(self) -> Iterator[Blob]:
        """Yield every blob."""
        for info in self.store.list(f"{self._prefix}blobs/"):
            yield Blob(info.key.rpartition("/")[2], info.size)

    def delete(self, digest: str) -> None:
        """Remove a blob; one that is not there is no error."""
        self.store.delete(self.key(digest))

    def sweep_staging(self, *, before: datetime) -> int:
        """Remove what crashed writers left in staging before a time; return how many."""
        left = [i.key for i in self.store.list(f"{self._prefix}staging/") if i.modified < before]
        for key in left:
            self.store.delete(key)
        return len(left)

    def _put_once(self, blob: Blob, data: bytes | Path) -> None:
        if self._is_whole(blob):
            return
        key = self.key(blob.digest)
        try:
            written = self.store.put(key, data, if_none_match=True)
        except PreconditionFailed:  # another writer of the same content was first, or a blob is damaged
            if self._is_whole(blob):
                return
            written = self.store.put(key, data)
        if written.size != blob.size:
            self.store.delete(key)
            raise PreconditionFailed(f"a file changed while it was stored as blob {blob.digest}", key=key)

    def _is_whole(self, blob: Blob) -> bool:
        """Whether the blob is there, by its bytes: a damaged one of the right size would stay for ever."""
        try:
            info = self.store.head(self.key(blob.digest))
            if info.size != blob.size:
                return False
            if self._whole.get(blob.digest) != info.etag:
                if self._read(pin(info)) != blob.digest:
                    return False
                self._whole[blob.digest] = info.etag
        except (ObjectNotFound, PreconditionFailed):
            return False
        return True

    def _read(self, ref: Ref) -> str:
        with self.store.open(ref.key, if_match=ref) as stream:
            reader = DigestingReader(stream, size=ref.size)
            for _ in chunks(reader):  # type: ignore[arg-type]
                pass
        return reader.digest

    def _name(self, staged: Ref, blob: Blob) -> None:
        if isinstance(self.store, Move):
            self.store.move(staged.key, self.key(blob.digest))
        else:
            self.store.copy(staged, self.key(blob.digest))


def check_digest(digest: str) -> str:
    """Return a BLAKE3 digest in lower-case hex. Raises InvalidName: no other text may become a path."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidName(f"{digest!r} is no BLAKE3 digest in hex")
    return digest


def _mismatch(key: str, expected: str, seen: str) -> DigestMismatch:
    return DigestMismatch(f"{key} has the digest {seen}, not {expected}", expected=expected, seen=seen, key=key)
