"""Pins: which content of each file a checkpoint is, and one digest for all of them together."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from weighbridge.storage.protocols import ObjectInfo, Ref
from weighbridge.storage.streaming import digest_bytes

_DISK = re.compile(r"([0-9]+)-([0-9]+)-(-?[0-9]+)-(?:-?[0-9]+)")
"""A `disk_etag`; dates before 1970 are negative."""


def pin(info: ObjectInfo) -> Ref:
    """Pin an object to the content that it has now."""
    return Ref(info.key, info.size, info.etag, info.version_id, info.modified.isoformat())


class DiskStamp(NamedTuple):
    """What the file system says of a file's content, without what a chmod or a link changes."""

    inode: int
    size: int
    modified_ns: int


def disk_etag(status: os.stat_result) -> str:
    """The ETag of a file on disk: any change of it, also of its mode or its number of links, is another one."""
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def disk_stamp(etag: str) -> DiskStamp | None:
    """What `disk_etag` was made of, but its ctime; None for ETags of other stores."""
    parts = _DISK.fullmatch(etag)
    return DiskStamp(*map(int, parts.groups())) if parts else None


def pins_digest(files: Iterable[Ref]) -> str:
    """BLAKE3, in hex, of the canonical JSON of the sorted pins: equal exactly for the same content at the same keys.

    An ETag alone would not do: the same bytes put again later share it. Whether they are other weights is not asked
    here (storage.identity).
    """
    pins = sorted([ref.key, ref.version_id or [ref.etag, ref.modified], ref.size] for ref in files)
    return digest_bytes(json.dumps(pins, separators=(",", ":"), ensure_ascii=False).encode())
