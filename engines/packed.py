"""Packed weights: a valid safetensors file whose matrices are codes with scales, made by streaming another one.

A tensor `name` that was compressed is two: `name`, the codes, and `name.scale`. All others are copied verbatim. The
header's `__metadata__` carries, under `weighbridge.packed`, canonical JSON that says what to make of it:

    {"format": 1, "group": 32, "method": "int4-groups", "tensors": {"name": ["BF16", [768, 3072]], …}}

with the original dtype and shape of each compressed tensor. Read as float32, rounded to the original dtype:

    weight = code · scale

method       codes                                        one scale (always > 0) for
int8-rows    I8, −127 … 127, in the original shape        a row, F32
fp8-tensors  F8_E4M3, up to ±448, in the original shape   a row, F32 (a scale a tensor would need two passes)
int4-groups  U8, two a byte, the first lowest, plus 8     `group` weights of a row, BF16 rounded towards zero
int2-groups  U8, four a byte, the first lowest, plus 2    `group` weights of a row, BF16 rounded towards zero

A *row* is the last dimension, joined by those before it while it has fewer than 64 weights; the first dimension is
never joined. So a linear layer has a scale for each output, a convolution for each output channel, stacked experts for
each output of each expert. One float32 product and one rounding give the same bits on every machine and device.

BF16 scales cost 16 bits a group (4.5 bits a weight in groups of 32), have float32's range, where F16's would end at
6e-8, and their error is far below half a step; rounded towards zero, no product exceeds the original's largest weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from weighbridge.engines import datatypes
from weighbridge.engines.errors import LoadError
from weighbridge.storage.errors import StorageError
from weighbridge.storage.names import SAFETENSORS
from weighbridge.storage.safetensors_header import Header, header_length, parse_header
from weighbridge.storage.strict_json import InvalidJson, parse_object

METADATA = "weighbridge.packed"
FORMAT = 1
SCALE = ".scale"
MIN_ROW = 64
_BLOCK = 1 << 20
"""Weights decoded at once, which bounds what decoding needs beside its result to about 12 MiB."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a method writes weights. `top` is the largest code, `bits` the width of one, `codes` their dtype."""

    method: str
    bits: int
    top: float
    codes: str
    scale: str
    grouped: bool


SCHEMES: Mapping[str, Scheme] = {
    scheme.method: scheme
    for scheme in (
        Scheme("int8-rows", 8, 127.0, "I8", "F32", grouped=False),
        Scheme("int4-groups", 4, 7.0, "U8", "BF16", grouped=True),
        Scheme("int2-groups", 2, 1.0, "U8", "BF16", grouped=True),
        Scheme("fp8-tensors", 8, 448.0, "F8_E4M3", "F32", grouped=False),
    )
}


class Unfit(ValueError):
    """A tensor that a scheme cannot write; the message says why."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A compressed tensor as a matrix: `rows` scales of `length` weights each, and the shapes in the file."""

    rows: int
    length: int
    codes: tuple[int, ...]
    scales: tuple[int, ...]


def layout(scheme: Scheme, group: int, dtype: str, shape: tuple[int, ...]) -> Layout:
    """Where a scheme puts a tensor. Raises Unfit."""
    if dtype not in datatypes.FLOATING:
        raise Unfit(f"{dtype} is not among {', '.join(sorted(datatypes.FLOATING))}")
    if len(shape) < 2:
        raise Unfit("fewer than two dimensions")
    if 0 in shape:
        raise Unfit("empty")
    first = len(shape) - 1
    while first > 1 and math.prod(shape[first:]) < MIN_ROW:
        first -= 1
    rows, row = shape[:first], math.prod(shape[first:])
    if not scheme.grouped:
        return Layout(math.prod(rows), row, shape, rows)
    each = 8 // scheme.bits
    if row % group:
        raise Unfit(f"rows of {row} do not divide into groups of {group}")
    if group % each:
        raise Unfit(f"groups of {group} do not fill bytes of {each}")
    return Layout(math.prod(shape) // group, group, (*rows, row // each), (*rows, row // group))


@dataclass(frozen=True, slots=True)
class Contents:
    """What a packed file says of itself: the method, its group, and {name: (original dtype, original shape)}."""

    scheme: Scheme
    group: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    def canonical(self) -> str:
        """The text under `weighbridge.packed`."""
        said = {
            "format": FORMAT,
            "method": self.scheme.method,
            "group": self.group,
            "tensors": {name: [dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()},
        }
        return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def unpack(files: Mapping[str, Path], device: str = "cpu") -> dict[str, torch.Tensor]:
    """Every tensor of packed files {path in the artifact: local file}, as it was before but for the rounding.

    Files that are not `.safetensors` are left out. Raises LoadError naming the file, the tensor and the rule.
    """
    weights: dict[str, torch.Tensor] = {}
    for path, file in files.items():
        if not path.endswith(SAFETENSORS):
            continue
        try:
            for name, tensor in _decoded(path, file, device):
                if name in weights:
                    raise LoadError(f"{path}: {name} is also in another file of the checkpoint")
                weights[name] = tensor
        except (SafetensorError, OSError, StorageError) as exc:
            raise LoadError(f"{path}: {exc}") from exc
    return weights


def read_header(file: Path) -> Header:
    """The checked header of a local file, which is as long as it says. Raises MalformedHeader, ShortFile, LoadError."""
    with file.open("rb") as stream:
        size = file.stat().st_size
        first = stream.read(9)
        length = header_length(first, file.name, size)
        stream.seek(8)
        header = parse_header(stream.read(length), file.name)
    if size != header.expected_size:
        raise LoadError(f"{file.name} has {size:,} bytes, {header.expected_size:,} by its header")
    return header


def contents(header: Header, path: str) -> Contents:
    """What the header of a packed file says, checked tensor by tensor. Raises LoadError."""
    said = _said(header, path)
    for name, (dtype, shape) in said.tensors.items():
        try:
            place = layout(said.scheme, said.group, dtype, shape)
        except Unfit as exc:
            raise LoadError(f"{path}: {name} cannot be {said.scheme.method}: {exc}") from exc
        if name + SCALE in said.tensors:
            raise LoadError(f"{path}: {name + SCALE} is both a compressed tensor and a scale")
        _check(header, path, name, said.scheme.codes, place.codes)
        _check(header, path, name + SCALE, said.scheme.scale, place.scales)
    return said


def _said(header: Header, path: str) -> Contents:
    if METADATA not in header.metadata:
        raise LoadError(f"{path} is not packed: its __metadata__ has no {METADATA}")
    try:
        fields = parse_object(header.metadata[METADATA].encode())
    except InvalidJson as exc:
        raise LoadError(f"{path}: {METADATA} is {exc}") from exc
    if fields.keys() != {"format", "method", "group", "tensors"} or fields["format"] != FORMAT:
        raise LoadError(f"{path}: {METADATA} must have format {FORMAT}, method, group, tensors and nothing else")
    method, group, tensors = fields["method"], fields["group"], fields["tensors"]
    if not isinstance(method, str) or method not in SCHEMES:
        raise LoadError(f"{path}: {str(method)[:40]!r} is no packed method; there are {', '.join(SCHEMES)}")
    if type(group) is not int or not 2 <= group <= 65536:
        raise LoadError(f"{path}: the group must be 2 to 65536")
    if not isinstance(tensors, dict):
        raise LoadError(f"{path}: tensors must be an object")
    return Contents(SCHEMES[method], group, {name: _original(path, name, said) for name, said in tensors.items()})


def _original(path: str, name: str, said: object) -> tuple[str, tuple[int, ...]]:
    match said:
        case [str(dtype), [*sizes]]:
            shape = tuple(size for size in sizes if type(size) is int and 0 <= size < 1 << 63)
            if len(shape) == len(sizes):
                return dtype, shape
    raise LoadError(f"{path}: {name} must be described as [dtype, shape]")


def _check(header: Header, path: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    info = header.tensors.get(name)
    if info is None:
        raise LoadError(f"{path}: {name} is missing")
    if (info.dtype, info.shape) != (dtype, shape):
        raise LoadError(
            f"{path}: {name} must be {dtype} {list(shape)} by what it was, not {info.dtype} {list(info.shape)}"
        )


def _decoded(path: str, file: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    header = read_header(file)
    said = contents(header, path)
    scales = {name + SCALE for name in said.tensors}
    with safe_open(file, "pt") as mapped:
        for name, _ in header.in_file_order:
            if name in said.tensors:
                dtype, shape = said.tensors[name]
                place = layout(said.scheme, said.group, dtype, shape)
                codes, scale = mapped.get_tensor(name), mapped.get_tensor(name + SCALE)
                yield name, _decode(f"{path}: {name}", codes, scale, said.scheme, place, dtype, shape, device)
            elif name not in scales:
                yield name, mapped.get_tensor(name).to(device)


def _decode(
    where: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    scheme: Scheme,
    place: Layout,
    dtype: str,
    shape: tuple[int, ...],
    device: str,
) -> torch.Tensor:
    """One tensor by blocks of rows. Raises LoadError when a scale or a weight is not finite."""
    weights = torch.empty(
        (place.rows, place.length), dtype=datatypes.to_torch(datatypes.from_safetensors(dtype)), device=device
    )
    codes, scale = codes.reshape(place.rows, -1), scale.reshape(place.rows, 1)
    step = max(1, _BLOCK // place.length)
    for start in range(0, place.rows, step):
        part = slice(start, start + step)
        steps = scale[part].to(device).float()
        if not bool(((steps > 0) & steps.isfinite()).all()):
            raise LoadError(f"{where} has a scale that is not a positive number")
        weights[part] = _values(codes[part].to(device), scheme).mul_(steps)
    if not all(math.isfinite(bound) for bound in (*map(float, torch.aminmax(weights)),)):
        raise LoadError(f"{where} decodes to NaN or Inf")
    return weights.reshape(shape)


def _values(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes as float32, in the order of the weights."""
    if scheme.bits == 8:
        return codes.float()
    mask, middle = (1 << scheme.bits) - 1, 1 << (scheme.bits - 1)
    parts = [(codes >> shift) & mask for shift in range(0, 8, scheme.bits)]
    return torch.stack(parts, dim=-1).flatten(1).float().sub_(middle)
