"""What a packed file will look like, decided from a header alone: what is compressed, what is kept, and where."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from weighbridge.engines import packed
from weighbridge.engines.packed import Contents, Layout, Scheme, Unfit
from weighbridge.registry.recipe import VariantWish
from weighbridge.storage.safetensors_header import BITS, MAX_HEADER, Header, TensorInfo
from weighbridge.workers.compression import report
from weighbridge.workers.compression.types import NotApplicable

MAX_ROW = 64 << 20
"""Bytes. A longer row would have to be held whole to know its scale; its tensor is kept."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor: `source` in the old file; in the new one its codes (or itself) at `at`, its scales at `scale_at`.

    `layout` is None where it is kept, and `reason` says why. Positions are bytes from the start of a file.
    """

    name: str
    source: TensorInfo
    layout: Layout | None
    reason: str
    at: int = 0
    scale_at: int = 0
    bytes_out: int = 0

    @property
    def bytes_in(self) -> int:
        return self.source.end - self.source.start


@dataclass(frozen=True, slots=True)
class Plan:
    """A file to write: `head` (length and header) first; `pieces` in the order of the old file."""

    scheme: Scheme
    pieces: tuple[Piece, ...]
    head: bytes
    size: int
    data_start: int
    """Where the old file's data begin."""


def plan(header: Header, wish: VariantWish, path: str, names: Collection[str]) -> Plan:
    """Decide what becomes of each tensor of a file; `names` are those of the whole checkpoint.

    Every floating matrix is compressed, embeddings too: one row of int8 loses little, and they are much of a small
    model. `wish.skip` keeps what should not be. Raises NotApplicable.
    """
    if packed.METADATA in header.metadata:
        raise NotApplicable(f"{path} is packed already")
    scheme = packed.SCHEMES[wish.method]
    chosen = [_choose(name, info, scheme, wish) for name, info in header.in_file_order]
    for piece in chosen:
        if piece.layout is not None and piece.name + packed.SCALE in names:
            scale = piece.name + packed.SCALE
            raise NotApplicable(f"tensor {piece.name}: {scale}, where its scales go, is a tensor already; skip one")
    entries, at, size = _place(chosen, scheme)
    said = Contents(
        scheme, wish.group, {piece.name: (piece.source.dtype, piece.source.shape) for piece in chosen if piece.layout}
    )
    text = json.dumps(
        {"__metadata__": {**header.metadata, packed.METADATA: said.canonical()}, **entries}, separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise NotApplicable(f"{path} would have a header of {len(text):,} bytes; at most {MAX_HEADER:,} are read")
    head = len(text).to_bytes(8, "little") + text
    pieces = tuple(_at(piece, at, len(head)) for piece in chosen)
    return Plan(scheme, pieces, head, len(head) + size, header.data_start)


def _choose(name: str, info: TensorInfo, scheme: Scheme, wish: VariantWish) -> Piece:
    """Compress or keep one tensor."""

    def kept(reason: str) -> Piece:
        return Piece(name, info, None, reason, bytes_out=info.end - info.start)

    if len(info.shape) < 2:
        return kept(report.SMALL)
    if (pattern := report.skipped(name, wish.skip)) is not None:
        return kept(f"skipped by {pattern}")
    try:
        layout = packed.layout(scheme, wish.group, info.dtype, info.shape)
    except Unfit as unfit:
        return kept(str(unfit))
    size = layout.rows * (layout.length * scheme.bits + BITS[scheme.scale]) // 8
    if size >= info.end - info.start:
        return kept(f"{size:,} bytes would be no fewer")
    if layout.length * BITS[info.dtype] > 8 * MAX_ROW:
        return kept(f"rows of {layout.length:,} weights are longer than {MAX_ROW:,} bytes")
    return Piece(name, info, layout, "", bytes_out=size)


def _place(chosen: Sequence[Piece], scheme: Scheme) -> tuple[dict[str, dict[str, object]], dict[str, int], int]:
    """Header entries, where each begins in the data, and the size of all: wide elements first, so that each is aligned.

    Some readers view tensors in place, which needs that.
    """
    wanted: list[tuple[str, str, tuple[int, ...]]] = []
    for piece in chosen:
        if piece.layout is None:
            wanted.append((piece.name, piece.source.dtype, piece.source.shape))
        else:
            wanted.append((piece.name, scheme.codes, piece.layout.codes))
            wanted.append((piece.name + packed.SCALE, scheme.scale, piece.layout.scales))
    kept: Mapping[str, int] = {piece.name: piece.bytes_in for piece in chosen if piece.layout is None}
    entries: dict[str, dict[str, object]] = {}
    at: dict[str, int] = {}
    end = 0
    for name, dtype, shape in sorted(wanted, key=lambda entry: -BITS[entry[1]]):
        start, end = end, end + (kept[name] if name in kept else math.prod(shape) * BITS[dtype] // 8)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        at[name] = start
    return entries, at, end


def _at(piece: Piece, at: Mapping[str, int], head: int) -> Piece:
    scale = head + at[piece.name + packed.SCALE] if piece.layout else 0
    return replace(piece, at=head + at[piece.name], scale_at=scale)
