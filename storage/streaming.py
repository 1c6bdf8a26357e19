"""Bytes in constant memory: chunks of a stream, and streams that digest what is read through them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 4 << 20
"""Bytes. Large enough that BLAKE3's threads pay off, small enough to be nobody's memory problem."""

Progress = Callable[[int], None]
"""Called with the number of bytes just done."""

_THREADED = 1 << 20
"""Bytes from which one buffer is worth more than one thread."""


def check_range(start: int, end: int | None) -> None:
    """Raise ValueError unless 0 <= start <= end."""
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"[{start}, {end}) is no range of bytes")


def chunks(stream: IO[bytes], size: int = CHUNK) -> Iterator[memoryview]:
    """Yield the stream's bytes through one reused buffer: each view is valid until the next is asked for."""
    buffer = memoryview(bytearray(size))
    while count := read_into(stream, buffer):
        yield buffer[:count]


def read_into(stream: IO[bytes], view: memoryview) -> int:
    """Fill `view` from a stream, by `readinto` where it has one; return the count of bytes, 0 at its end."""
    readinto: Callable[[memoryview], int | None] | None = getattr(stream, "readinto", None)
    if readinto is not None:
        return readinto(view) or 0
    data = stream.read(len(view))
    view[: len(data)] = data
    return len(data)


def new_hasher(size: int | None = None) -> blake3:
    """A BLAKE3 hasher for `size` bytes (None: unknown, large).

    Threads of its own: the shared pool of `AUTO` does not survive a fork, and Celery forks.
    """
    threads = min(4, os.cpu_count() or 1) if size is None or size >= _THREADED else 1
    return blake3(max_threads=threads)


def digest_bytes(data: bytes) -> str:
    """BLAKE3 of bytes, in hex."""
    return new_hasher(len(data)).update(data).hexdigest()


def digest_file(path: Path) -> str:
    """BLAKE3 of a file, in hex, through a memory map."""
    hasher = new_hasher(path.stat().st_size)
    hasher.update_mmap(path)
    return hasher.hexdigest()


class DigestingReader(io.RawIOBase):
    """Passes a stream's bytes on while digesting and counting them. Does not close the stream."""

    def __init__(self, stream: IO[bytes], *, size: int | None = None, progress: Progress | None = None) -> None:
        self._stream, self._progress = stream, progress
        self._hasher = new_hasher(size)
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        count = read_into(self._stream, view)
        self._hasher.update(view[:count])
        self.size += count
        if self._progress is not None and count:
            self._progress(count)
        return count

    @property
    def digest(self) -> str:
        """BLAKE3 of what was read so far, in hex."""
        return self._hasher.hexdigest()
