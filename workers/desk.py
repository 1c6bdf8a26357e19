"""What a stage may ask for while it runs, and the desk that answers out of the worker's own store and blobs.

A stage is a function of its task and a desk. In the worker the desk is `OwnDesk`; in a confined child it is one that
asks the worker's. Bytes are moved and hashed in the worker only: a child never holds a store.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from enum import StrEnum
from pathlib import Path
from typing import IO, Protocol

from weighbridge.engines.protocols import BlobPath
from weighbridge.storage import identity
from weighbridge.storage.blobs import Blob, Blobs
from weighbridge.storage.protocols import Get, Ref
from weighbridge.storage.safetensors_header import Header
from weighbridge.workers.taking import Taken, take


class Phase(StrEnum):
    """What a stage is at: it decides which limits hold, and whose failure its end would be."""

    READING = "reading"
    """Parsing what strangers wrote: what exceeds the limits here is the checkpoint's own doing."""
    RUNNING = "running"
    """Loading and asking a program."""


class Desk(Get, Protocol):
    """Everything outside of a stage's own memory. `get` and `open` read the pinned files of its subject."""

    def take(self, name: str, ref: Ref, header: Header | None) -> Taken:
        """Digest a file, and of weights (with a header) keep and look at it. Raises PreconditionFailed."""
        ...

    def digest(self, refs: Iterable[Ref]) -> str:
        """The digest of weights that are not kept. Raises PreconditionFailed, ObjectNotFound."""
        ...

    def path(self, digest: str) -> Path:
        """A verified blob as a local file. Raises ObjectNotFound, DigestMismatch."""
        ...

    def put_bytes(self, data: bytes) -> Blob:
        """Keep bytes as a blob."""
        ...

    def put_file(self, path: Path) -> Blob:
        """Keep a file of `scratch` as a blob."""
        ...

    @property
    def scratch(self) -> Path:
        """A folder for temporary files of the stage."""
        ...

    def progress(self, share: float) -> None:
        """Say how much is done, 0 to 1. Raises what ends the stage."""
        ...

    def enter(self, phase: Phase) -> None:
        """Say what comes now; a stage begins with READING."""
        ...


class Forbidden(Exception):
    """A stage asked for what is not its subject's."""


class OwnDesk:
    """The worker's own. `cache` gives a blob as a local file; `files`: the pinned files that may be read."""

    def __init__(
        self,
        source: Get,
        blobs: Blobs,
        cache: BlobPath,
        scratch: Path,
        progress: Callable[[float], None] = lambda _: None,
        files: Collection[Ref] = (),
    ) -> None:
        self._source, self._blobs, self._cache, self._scratch = source, blobs, cache, scratch
        self._progress, self._files = progress, frozenset(files)
        self._size, self._done = max(1, sum(ref.size for ref in files)), 0

    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        self._check(if_match)
        return self._source.get(key, start=start, end=end, if_match=if_match)

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        self._check(if_match)
        return self._source.open(key, start=start, end=end, if_match=if_match)

    def take(self, name: str, ref: Ref, header: Header | None) -> Taken:
        self._check(ref)
        return take(self._source, name, ref, header, self._blobs, self._moved)

    def digest(self, refs: Iterable[Ref]) -> str:
        wanted = tuple(refs)
        for ref in wanted:
            self._check(ref)
        return identity.read(self._source, wanted, self._moved)

    def path(self, digest: str) -> Path:
        return self._cache(digest)

    def put_bytes(self, data: bytes) -> Blob:
        return self._blobs.put_bytes(data)

    def put_file(self, path: Path) -> Blob:
        if not path.resolve().is_relative_to(self.scratch.resolve()):
            raise Forbidden(f"{path} does not lie in {self.scratch}")
        return self._blobs.put_file(path)

    @property
    def scratch(self) -> Path:
        return self._scratch

    def progress(self, share: float) -> None:
        self._progress(share)

    def enter(self, phase: Phase) -> None:
        """Nothing is limited here."""

    def _check(self, ref: Ref | None) -> None:
        if ref not in self._files:
            raise Forbidden(f"{ref.key if ref else 'an object without a pin'} is no file of this checkpoint")

    def _moved(self, count: int) -> None:
        self._done += count
        self._progress(min(1.0, self._done / self._size))
