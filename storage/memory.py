"""Objects in this process's memory: the fake that tests and dry runs use, held to the same contract as S3."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from weighbridge.storage.errors import ObjectNotFound, PreconditionFailed
from weighbridge.storage.keys import check_key, check_prefix, is_valid
from weighbridge.storage.listing import one_level
from weighbridge.storage.protocols import Entry, ObjectInfo, PassedOver, Ref
from weighbridge.storage.streaming import check_range


class MemoryStore:
    """A store in a dictionary. Thread-safe; gone with the process. `MemoryStore.named` shares one by name."""

    _named: dict[str, MemoryStore] = {}  # noqa: RUF012  (shared on purpose: what `memory://name` means)

    def __init__(self, name: str = "store") -> None:
        self._name = name
        self._objects: dict[str, tuple[ObjectInfo, bytes]] = {}
        self._lock = threading.Lock()
        self._puts = 0

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        """Return this process's store of that name, the same one each time."""
        return cls._named.setdefault(name, cls(name))

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    def check(self) -> None:
        """Memory always answers."""

    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        check_range(start, end)
        return self._find(key, if_match)[1][start:end]

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        return io.BytesIO(self.get(key, start=start, end=end, if_match=if_match))

    def head(self, key: str) -> ObjectInfo:
        return self._find(key)[0]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            found = [info for key, (info, _) in self._objects.items() if key.startswith(prefix)]
        return iter(sorted(found, key=lambda info: info.key))

    def survey(self, prefix: str = "") -> Iterator[ObjectInfo | PassedOver]:
        return iter(self.list(prefix)) if not prefix or is_valid(prefix.removesuffix("/")) else iter(())

    def find(self, key: str) -> ObjectInfo | PassedOver | None:
        with self._lock:
            found = self._objects.get(key)
        return None if found is None else found[0]

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        return one_level(self.list(prefix), prefix)

    def put(self, key: str, data: bytes | IO[bytes] | Path, *, if_none_match: bool = False) -> ObjectInfo:
        check_key(key)
        content = _read(data)
        with self._lock:
            if if_none_match and key in self._objects:
                raise PreconditionFailed(f"{key} is already there", key=key)
            self._puts += 1
            # A counter, not a digest: the same bytes put again are another content to whoever pinned the first.
            info = ObjectInfo(key, len(content), f"{self._puts:x}", datetime.now(UTC))
            self._objects[key] = info, content
        return info

    def copy(self, source: Ref, key: str) -> ObjectInfo:
        return self.put(key, self.get(source.key, if_match=source))

    def move(self, source: str, key: str) -> ObjectInfo:
        info = self.put(key, self.get(source))
        self.delete(source)
        return info

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def _find(self, key: str, if_match: Ref | None = None) -> tuple[ObjectInfo, bytes]:
        check_key(key)
        with self._lock:
            found = self._objects.get(key)
        if found is None:
            raise ObjectNotFound(f"{self.url} has no object {key}", key=key)
        if if_match is not None and found[0].etag != if_match.etag:
            raise PreconditionFailed(f"{key} is no longer the content that was pinned", key=key)
        return found


def _read(data: bytes | IO[bytes] | Path) -> bytes:
    if isinstance(data, Path):
        return data.read_bytes()
    return bytes(data) if isinstance(data, bytes | bytearray | memoryview) else data.read()
