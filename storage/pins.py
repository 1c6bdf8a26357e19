"""Pins: which content of each file a checkpoint is, and one digest for all of them together."""

from __future__ import annotations

import json
from collections.abc import Iterable

from weighbridge.storage.protocols import ObjectInfo, Ref
from weighbridge.storage.streaming import digest_bytes


def pin(info: ObjectInfo) -> Ref:
    """Pin an object to the content that it has now."""
    return Ref(info.key, info.size, info.etag, info.version_id, info.modified.isoformat())


def pins_digest(files: Iterable[Ref]) -> str:
    """BLAKE3, in hex, of the canonical JSON of the sorted pins: equal exactly for the same content at the same keys.

    An ETag alone would not do: the same bytes put again later are another checkpoint, and share its ETag.
    """
    pins = sorted([ref.key, ref.version_id or [ref.etag, ref.modified], ref.size] for ref in files)
    return digest_bytes(json.dumps(pins, separators=(",", ":"), ensure_ascii=False).encode())
