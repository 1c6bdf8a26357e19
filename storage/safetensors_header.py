"""The header of a safetensors file, read by ranges and believed only where everything adds up.

A file is 8 bytes of header length N (little-endian), N bytes of JSON, and the tensors' bytes without gaps. Offsets
count from the end of the header. Nothing of the data is read here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from weighbridge import limits
from weighbridge.storage.errors import StorageError
from weighbridge.storage.json_stream import JsonStream
from weighbridge.storage.protocols import Get, Ref
from weighbridge.storage.strict_json import InvalidJson

MAX_HEADER = 100_000_000
"""Bytes: the format's own limit. It is read piece by piece, so that a bomb costs no more than what is kept of it."""
MAX_TENSORS = 200_000
"""Of a file, and of a checkpoint: mixtures of experts that keep a scale beside each matrix come to about 100,000 (256
experts in 58 layers, 3 matrices each), so that less would refuse what people serve. It costs 5 s of a processor."""
MAX_AXES = 8 * MAX_TENSORS
"""Of all tensors together: those of models have one to five each, and 32 each would cost more than the tensors."""
MAX_METADATA = 16 << 20
"""Characters of `__metadata__` in all; trainers keep their settings there."""
_ENTRY, _NOTES = 4096, 10_000
"""Characters of what a header says of one tensor; entries of `__metadata__`."""
MAX_RANK = 32
FIRST_READ = 64 << 10
"""Bytes of the first ranged read: most headers whole, in one request."""

BITS: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of one element, by safetensors dtype."""

_METADATA = "__metadata__"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a Python pickle",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip file",
    b"{": "JSON text without the length before it",
    b"<": "markup text",
    b"version https://git-lfs": "a Git LFS pointer instead of the file",
}


class MalformedHeader(StorageError, ValueError):
    """The file is no valid safetensors file, and more bytes cannot make it one. Names file, tensor and rule."""


class ShortFile(StorageError):
    """The file is shorter than it says: `have` of `need` bytes (`need` is a lower bound before the header is read)."""

    def __init__(self, key: str, have: int, need: int) -> None:
        super().__init__(f"{key} has {have:,} of {need:,} bytes", key=key)
        self.have, self.need = have, need


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: bytes [start, end) of the data, which begins at the header's `data_start`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header that adds up. `length` is N; `expected_size` is the size of the whole file in bytes."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    length: int

    @property
    def data_start(self) -> int:
        return 8 + self.length

    @property
    def data_size(self) -> int:
        return max((tensor.end for tensor in self.tensors.values()), default=0)

    @property
    def in_file_order(self) -> list[tuple[str, TensorInfo]]:
        """By where their bytes lie; an empty one comes before the one that begins at the same place."""
        return _in_file_order(self.tensors)

    @property
    def expected_size(self) -> int:
        return self.data_start + self.data_size


def read_header(store: Get, ref: Ref) -> Header:
    """Read and check the header of a pinned file, and that the file is exactly as long as it says.

    Raises MalformedHeader (wrong by content), ShortFile (more bytes could complete it), PreconditionFailed.
    """
    return read_start(store, ref).header()


@dataclass(frozen=True, slots=True)
class HeaderStart:
    """The first bytes of a pinned file, and the `length` of the header that they announce: it can still be refused."""

    store: Get
    ref: Ref
    first: bytes
    length: int

    def header(self) -> Header:
        """Read the header piece by piece; as `read_header`."""
        ref, end = self.ref, 8 + self.length
        if end <= len(self.first):
            header = _parse(io.BytesIO(self.first[8:end]), self.length, ref.key)
        else:
            with self.store.open(ref.key, start=8, end=end, if_match=ref) as stream:
                header = _parse(stream, self.length, ref.key)
        if ref.size < header.expected_size:
            raise ShortFile(ref.key, ref.size, header.expected_size)
        if ref.size > header.expected_size:
            raise _malformed(ref.key, f"has {ref.size:,} bytes, {header.expected_size:,} by its header")
        return header


def read_start(store: Get, ref: Ref) -> HeaderStart:
    """Read the beginning of a pinned file. Raises MalformedHeader, ShortFile, PreconditionFailed."""
    first = store.get(ref.key, end=min(ref.size, FIRST_READ), if_match=ref)
    return HeaderStart(store, ref, first, header_length(first, ref.key, ref.size))


def header_length(first: bytes, key: str, size: int) -> int:
    """N from the first bytes of a file of `size` bytes. Raises MalformedHeader, ShortFile."""
    length = int.from_bytes(first[:8], "little")  # of fewer than 8 bytes: a lower bound
    if length > MAX_HEADER or first[8:9] not in (b"", b"{"):
        raise _malformed(key, _foreign(first, length))
    if len(first) < 8:
        raise ShortFile(key, size, 8)
    if length < 2:
        raise _malformed(key, f"has a header of {length} bytes, and the shortest has 2")
    if size < 8 + length:
        raise ShortFile(key, size, 8 + length)
    return length


def parse_header(data: bytes, key: str) -> Header:
    """Check the JSON of a header: names, dtypes, shapes, offsets without gap or overlap. Raises MalformedHeader."""
    return _parse(io.BytesIO(data), len(data), key)


def _parse(stream: IO[bytes], length: int, key: str) -> Header:
    tensors, metadata, axes = dict[str, TensorInfo](), None, 0
    try:
        reader = JsonStream(stream)
        for name in reader.members(names=_ENTRY, count=MAX_TENSORS + 1):
            if name in tensors or (name == _METADATA and metadata is not None):
                raise InvalidJson(f"the key {limits.quoted(name)} is there twice")
            if name == _METADATA:
                metadata = _metadata(reader, key)
            else:
                tensors[name] = tensor = _tensor(key, name, reader.value(_ENTRY))
                axes += len(tensor.shape)
                if axes > MAX_AXES:
                    raise _malformed(key, f"has tensors with more than our limit of {MAX_AXES:,} axes together")
        reader.end()
    except InvalidJson as error:
        raise _malformed(key, f"has a header that is {error}") from error
    if len(tensors) > MAX_TENSORS:
        raise _malformed(key, f"has {len(tensors):,} tensors, more than our limit of {MAX_TENSORS:,}")
    _check_layout(key, tensors)
    return Header(tensors, metadata or {}, length)


def _metadata(reader: JsonStream, key: str) -> dict[str, str]:
    found, left = dict[str, str](), MAX_METADATA
    if not reader.is_object():
        raise _malformed(key, "has a __metadata__ that is not text by text")
    for name in reader.members(names=_ENTRY, count=_NOTES):
        if name in found:
            raise InvalidJson(f"the key {limits.quoted(name)} is there twice")
        if not reader.is_string():
            raise _malformed(key, "has a __metadata__ that is not text by text")
        found[name] = reader.string(left)
        left -= len(name) + len(found[name])
    return found


def _tensor(key: str, name: str, value: Any) -> TensorInfo:
    if not name or not name.isprintable():
        raise _malformed(key, f"has a tensor with an empty or unprintable name {limits.quoted(name)}")
    if len(name) > limits.TENSOR:
        raise _malformed(
            key, f"has a tensor whose name has more than {limits.TENSOR} characters: {limits.quoted(name)}"
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(key, "needs exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _malformed(key, f"has the unknown dtype {str(dtype)[:40]!r}", name)
    if not _is_counts(shape) or len(shape) > MAX_RANK:
        raise _malformed(key, f"has a shape that is no list of at most {MAX_RANK} sizes", name)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(key, "has data_offsets that are no [start, end]", name)
    start, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - start):
        needs = f"{bits:,} bits" if bits < 1 << 66 else "more than 2^63 bytes"
        raise _malformed(key, f"of {dtype} {shape} needs {needs}, its offsets span {end - start:,} bytes", name)
    return TensorInfo(dtype, tuple(shape), start, end)


def _in_file_order(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    return sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))


def _check_layout(key: str, tensors: Mapping[str, TensorInfo]) -> None:
    position = 0
    for name, tensor in _in_file_order(tensors):
        if tensor.start != position:
            fault = "overlaps the one before it" if tensor.start < position else "leaves a hole before it"
            raise _malformed(key, f"{fault}: it starts at {tensor.start:,}, not at {position:,}", name)
        position = tensor.end


def _foreign(first: bytes, length: int) -> str:
    for magic, what in _FOREIGN.items():
        if first.startswith(magic):
            return f"is {what}, not a safetensors file"
    if length > MAX_HEADER:
        return f"has a header of {length:,} bytes, larger than the limit of {MAX_HEADER:,}, the format's and ours"
    return "has a header that is no JSON object"


def _is_counts(value: object) -> bool:
    """Quickly: it is asked twice a tensor, and there may be 32 sizes."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < 1 << 63)


def _malformed(key: str, rule: str, tensor: str | None = None) -> MalformedHeader:
    return MalformedHeader(f"{key}: tensor {tensor!r} {rule}" if tensor else f"{key} {rule}", key=key)
