"""`*.safetensors.index.json`: which shard holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weighbridge import limits
from weighbridge.storage.errors import StorageError
from weighbridge.storage.keys import is_valid
from weighbridge.storage.names import SAFETENSORS
from weighbridge.storage.protocols import Get, Ref
from weighbridge.storage.strict_json import InvalidJson, TruncatedJson, parse_object

MAX_SIZE = 64 << 20
"""Bytes; the index of a model of 100,000 tensors has about 10 MB."""


class MalformedIndex(StorageError, ValueError):
    """An index breaks its format; `truncated` says that it may only have been broken off."""

    def __init__(self, message: str, *, key: str, truncated: bool = False) -> None:
        super().__init__(message, key=key)
        self.truncated = truncated


@dataclass(frozen=True, slots=True)
class Index:
    """Tensor → file beside the index, and the bytes of all tensors where the index says."""

    weight_map: Mapping[str, str]
    total_size: int | None

    @property
    def shards(self) -> frozenset[str]:
        return frozenset(self.weight_map.values())


def read_index(store: Get, ref: Ref) -> Index:
    """Read a pinned index. Raises MalformedIndex naming the rule, PreconditionFailed."""
    if ref.size > MAX_SIZE:
        raise MalformedIndex(f"{ref.key} has {ref.size:,} bytes, more than {MAX_SIZE:,}", key=ref.key)
    try:
        fields = parse_object(store.get(ref.key, if_match=ref))
    except InvalidJson as error:
        truncated = isinstance(error, TruncatedJson)
        raise MalformedIndex(f"{ref.key}: {error}", key=ref.key, truncated=truncated) from error
    weight_map, metadata = fields.get("weight_map"), fields.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedIndex(f"{ref.key}: weight_map is missing or empty", key=ref.key)
    for name in set(map(str, weight_map.values())):
        if "/" in name or not is_valid(name) or not name.endswith(SAFETENSORS):
            what = f"weight_map names {limits.quoted(name)}, no {SAFETENSORS} file beside it"
            raise MalformedIndex(f"{ref.key}: {what}", key=ref.key)
    if (longest := max(weight_map, key=len)) and len(longest) > limits.TENSOR:
        what = f"a tensor's name has at most {limits.TENSOR} characters, not {limits.quoted(longest)}"
        raise MalformedIndex(f"{ref.key}: {what}", key=ref.key)
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(weight_map, total if isinstance(total, int) else None)
