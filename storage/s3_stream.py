"""The body of a GET as a stream that survives a broken connection, and never mixes two contents in doing so."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError

from weighbridge.storage.errors import StorageUnavailable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_RESUMES = 4
"""Times that one stream may be taken up again before it fails."""


class ResumingBody(io.RawIOBase):
    """Bytes of one GET; when the connection breaks, a further ranged `get` with If-Match takes it up where it broke.

    Raises StorageUnavailable when that does not help, PreconditionFailed when the object is another by then.
    """

    def __init__(
        self,
        get: Callable[[dict[str, Any]], Any],
        request: dict[str, Any],
        answer: Any,
        url: str,
        key: str,
        *,
        start: int,
    ) -> None:
        self._get, self._url, self._key = get, url, key
        self._body = answer["Body"]
        self._position, self._left = start, int(answer["ContentLength"])
        self._request = request | {"IfMatch": answer["ETag"]}
        self._resumes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")[: self._left]
        while len(view):
            if data := self._read(len(view)):
                view[: len(data)] = data
                self._position += len(data)
                self._left -= len(data)
                return len(data)
            self._resume()
        return 0

    def readall(self) -> bytes:
        buffer = bytearray(self._left)
        view, filled = memoryview(buffer), 0
        while count := self.readinto(view[filled:]):
            filled += count
        return bytes(view[:filled])

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()

    def _read(self, count: int) -> bytes:
        """Bytes, or none where the connection broke before the end."""
        try:
            return bytes(self._body.read(count))
        except (BotoCoreError, OSError):
            return b""  # the caller takes it up again, and gives up after a few times

    def _resume(self) -> None:
        self._resumes += 1
        if self._resumes > _RESUMES:
            raise StorageUnavailable(f"{self._url}: {self._key}: the connection broke {_RESUMES} times", key=self._key)
        self._body.close()
        bounds = f"bytes={self._position}-{self._position + self._left - 1}"
        self._body = self._get(self._request | {"Range": bounds})["Body"]
