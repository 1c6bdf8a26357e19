"""`*.safetensors.index.json`: which shard holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weighbridge import limits
from weighbridge.storage.errors import StorageError
from weighbridge.storage.json_stream import JsonStream
from weighbridge.storage.keys import is_valid
from weighbridge.storage.names import SAFETENSORS
from weighbridge.storage.protocols import Get, Ref
from weighbridge.storage.safetensors_header import MAX_TENSORS
from weighbridge.storage.strict_json import InvalidJson, TruncatedJson

MAX_SIZE = 64 << 20
"""Bytes; the index of a model of 100,000 tensors has about 10 MB."""

_FIELD, _FIELDS, _SHARD, _OTHER = 200, 100, 1100, 128 << 10
"""Characters of a field's name; fields; characters of a shard's name, and of what is in all other fields."""


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
    """Read a pinned index, piece by piece. Raises MalformedIndex naming the rule, PreconditionFailed."""
    if ref.size > MAX_SIZE:
        raise MalformedIndex(f"{ref.key} has {ref.size:,} bytes, larger than our limit of {MAX_SIZE:,}", key=ref.key)
    try:
        with store.open(ref.key, if_match=ref) as stream:
            return _parse(JsonStream(stream), ref.key)
    except InvalidJson as error:
        truncated = isinstance(error, TruncatedJson)
        raise MalformedIndex(f"{ref.key}: {error}", key=ref.key, truncated=truncated) from error


def _parse(reader: JsonStream, key: str) -> Index:
    weight_map: dict[str, str] = {}
    seen, total = set[str](), None
    for field in reader.members(names=_FIELD, count=_FIELDS):
        if field in seen:
            raise InvalidJson(f"the key {limits.quoted(field)} is there twice")
        seen.add(field)
        if field == "weight_map" and reader.is_object():
            weight_map = _weight_map(reader, key)
            continue
        value = reader.value(_OTHER)
        if field == "metadata" and isinstance(value, dict):
            total = value.get("total_size")
    reader.end()
    if not weight_map:
        raise MalformedIndex(f"{key}: weight_map is missing or empty", key=key)
    return Index(weight_map, total if isinstance(total, int) else None)


def _weight_map(reader: JsonStream, key: str) -> dict[str, str]:
    """Tensor → shard, every shard's name kept once."""
    found, shards = dict[str, str](), dict[str, str]()
    for tensor in reader.members(names=_OTHER, count=MAX_TENSORS):
        if len(tensor) > limits.TENSOR:
            what = f"a tensor's name has at most {limits.TENSOR} characters, not {limits.quoted(tensor)}"
            raise MalformedIndex(f"{key}: {what}", key=key)
        if tensor in found:
            raise InvalidJson(f"the key {limits.quoted(tensor)} is there twice")
        name = str(reader.value(_SHARD))
        if name not in shards and ("/" in name or not is_valid(name) or not name.endswith(SAFETENSORS)):
            what = f"weight_map names {limits.quoted(name)}, no {SAFETENSORS} file beside it"
            raise MalformedIndex(f"{key}: {what}", key=key)
        found[tensor] = shards.setdefault(name, name)
    return found
