"""The streaming methods: int8-rows, int4-groups, int2-groups, fp8-tensors, for any safetensors file of any size.

Offsets in the new file follow from the old one's header, so threads take blocks of rows (2 MiB), each reading,
quantizing and writing its own in place: no tensor is ever held whole. Needs no program, no calibration, no second pass.

By itself: `python -m weighbridge.workers.compression.streaming model.safetensors --method int8-rows --out small`.
"""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weighbridge.engines import datatypes, packed
from weighbridge.engines.errors import LoadError
from weighbridge.engines.manifest import Encoding
from weighbridge.registry.recipe import VariantWish
from weighbridge.registry.schemas import VariantTensor
from weighbridge.storage import names
from weighbridge.storage.errors import StorageError
from weighbridge.storage.safetensors_header import BITS, Header
from weighbridge.workers.compression import kernels, report
from weighbridge.workers.compression.packing import Piece, Plan, plan
from weighbridge.workers.compression.types import BuildFailed, Built, NotApplicable, Order, Progress

BLOCK = 2 << 20
"""Bytes read at once, unless one row is longer: small enough that they are still in a cache when they are quantized."""
THREADS = 2
"""At least: while one waits for the disk, the other computes. Each holds two blocks."""


def build(order: Order) -> Built:
    """Pack the original's one weight file into `order.folder`. Raises NotApplicable, BuildFailed."""
    weights = _weights(order)
    if len(weights) != 1:
        raise BuildFailed(f"{len(weights)} weight files: each is built by itself, with build_shard")
    return build_shard(order, 0)


def build_shard(order: Order, index: int) -> Built:
    """Pack weight file `index` (of the manifest's `.safetensors`, in its order). Raises NotApplicable, BuildFailed.

    `promised_ratio`, `encoding` and `engine` hold for the whole checkpoint too where every shard's are joined.
    """
    weights = _weights(order)
    headers = {path: header(file) for path, file in weights.items()}
    tensors = {name for one in headers.values() for name in one.tensors}
    plans = {path: plan(one, order.wish, path, tensors) for path, one in headers.items()}
    refuse_nothing([piece for one in plans.values() for piece in one.pieces], order.wish)
    path = list(weights)[index]
    target = order.folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    threads = max(THREADS, order.original.threads)
    rows, notes = write(plans[path], weights[path], target, threads=threads, progress=order.progress)
    floats = {info.dtype for info in headers[path].tensors.values()} & datatypes.FLOATING
    return Built(
        files={path: target},
        tensors=rows,
        engine=dict(order.original.manifest.engine) or {"name": "torch"},
        encoding=Encoding(kind="packed", details={"method": order.wish.method, "format": str(packed.FORMAT)}),
        promised_ratio=_ratio(plans[path].pieces),
        compute_dtypes=tuple(sorted(floats)),
        notes=notes,
    )


def write(
    planned: Plan, source: Path, target: Path, *, threads: int = THREADS, progress: Progress = lambda _: None
) -> tuple[tuple[VariantTensor, ...], tuple[str, ...]]:
    """Write a planned file; return what became of each tensor, and what a person should know.

    Raises BuildFailed naming the tensor that holds NaN or Inf, or when the source is shorter than it was; OSError.
    """
    used = {piece.source.dtype for piece in planned.pieces if piece.layout}
    picked = {dtype: kernels.pick(dtype) for dtype in sorted(used)}
    with source.open("rb", buffering=0) as old, target.open("xb", buffering=0) as new:
        os.ftruncate(new.fileno(), planned.size)
        os.pwrite(new.fileno(), planned.head, 0)
        work = _Work(planned, old.fileno(), new.fileno(), {dtype: kernel for dtype, (kernel, _) in picked.items()})
        work.run(threads, progress)
    rows = tuple(_row(piece, planned, work.sums.get(piece.name)) for piece in planned.pieces)
    return rows, tuple(sorted({note for _, note in picked.values() if note}))


@dataclass(frozen=True, slots=True)
class _Block:
    """Part of a tensor: scales [first, first + count) of what is compressed, else that range of its bytes."""

    piece: Piece
    first: int
    count: int
    nbytes: int


class _Work:
    """The blocks of one file, shared by threads. `sums`: per tensor the (Σ w², Σ error²) of its blocks."""

    def __init__(self, planned: Plan, old: int, new: int, by_dtype: Mapping[str, kernels.Kernel]) -> None:
        self._plan, self._old, self._new, self._kernels = planned, old, new, by_dtype
        self._blocks = _blocks(planned.pieces)
        self._lock = threading.Lock()
        self._done = 0
        self._total = max(1, sum(piece.bytes_in for piece in planned.pieces))
        self._longest = max((_row_bytes(piece) for piece in planned.pieces if piece.layout), default=0)
        self.sums: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def run(self, threads: int, progress: Progress) -> None:
        """Take blocks until there are none; the first error ends every thread."""
        with ThreadPoolExecutor(threads, thread_name_prefix="pack") as pool:
            for thread in [pool.submit(self._thread, progress) for _ in range(threads)]:
                thread.result()

    def _thread(self, progress: Progress) -> None:
        size = max(BLOCK, self._longest)
        buffers = tuple(np.empty(length, np.uint8) for length in (size, size // 2, size // 2))
        try:
            while block := self._next():
                self._do(block, *buffers)
                with self._lock:
                    self._done += block.nbytes
                    progress(self._done / self._total)
        except BaseException:
            with self._lock:
                self._blocks = iter(())
            raise

    def _next(self) -> _Block | None:
        with self._lock:
            return next(self._blocks, None)

    def _do(self, block: _Block, read: kernels.Bytes, codes: kernels.Bytes, scales: kernels.Bytes) -> None:
        piece, scheme = block.piece, self._plan.scheme
        skipped = block.first * (_row_bytes(piece) if piece.layout else 1)
        source = read[: block.nbytes]
        self._read(source, self._plan.data_start + piece.source.start + skipped, piece.name)
        if piece.layout is None:
            self._write(source, piece.at + block.first)
            return
        width, wide = piece.layout.length * scheme.bits // 8, BITS[scheme.scale] // 8
        codes, scales = codes[: block.count * width], scales[: block.count * wide]
        try:
            kernel = self._kernels[piece.source.dtype]
            sums = kernel(scheme, source, block.count, piece.layout.length, codes, scales)
        except kernels.NonFinite as exc:
            raise BuildFailed(f"tensor {piece.name} holds NaN or Inf, or a float64 that no float32 holds") from exc
        self._write(codes, piece.at + block.first * width)
        self._write(scales, piece.scale_at + block.first * wide)
        with self._lock:
            self.sums[piece.name].append(sums)

    def _read(self, into: kernels.Bytes, at: int, name: str) -> None:
        view = into.data
        while view:
            count = os.preadv(self._old, [view], at)
            if not count:
                raise BuildFailed(f"tensor {name}: the file ended within it, so it changed while it was read")
            view, at = view[count:], at + count

    def _write(self, data: kernels.Bytes, at: int) -> None:
        view = data.data
        while view:
            count = os.pwrite(self._new, view, at)
            view, at = view[count:], at + count


def _blocks(pieces: Collection[Piece]) -> Iterator[_Block]:
    for piece in pieces:
        each = _row_bytes(piece) if piece.layout else 1
        total, step = piece.bytes_in // each, max(1, BLOCK // each)
        for first in range(0, total, step):
            count = min(step, total - first)
            yield _Block(piece, first, count, count * each)


def _row_bytes(piece: Piece) -> int:
    """Bytes in the old file that share one scale; at most MAX_ROW."""
    assert piece.layout is not None
    return piece.layout.length * BITS[piece.source.dtype] // 8


def _row(piece: Piece, planned: Plan, sums: list[tuple[float, float]] | None) -> VariantTensor:
    signal, noise = (math.fsum(part) for part in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    return VariantTensor(
        name=piece.name,
        action=planned.scheme.method if piece.layout else report.KEPT,
        reason=piece.reason,
        bytes_in=piece.bytes_in,
        bytes_out=piece.bytes_out,
        sqnr=round(10 * math.log10(signal / noise), 2) if signal and noise else None,
    )


def _ratio(pieces: Collection[Piece]) -> float:
    return sum(piece.bytes_out for piece in pieces) / max(1, sum(piece.bytes_in for piece in pieces))


def refuse_nothing(pieces: Collection[Piece], wish: VariantWish) -> None:
    """Raise NotApplicable where nothing would change: no silent no-op."""
    if any(piece.layout for piece in pieces):
        return
    kept = "; ".join(f"{piece.name}: {piece.reason}" for piece in list(pieces)[:3])
    raise NotApplicable(f"{wish.method} changes no tensor ({kept or 'there are none'})")


def _weights(order: Order) -> dict[str, Path]:
    files = order.original.manifest.files
    return {file.path: order.original.cache(file.digest) for file in files if file.path.endswith(names.SAFETENSORS)}


def header(file: Path) -> Header:
    """The header of a local weight file. Raises BuildFailed."""
    try:
        return packed.read_header(file)
    except (StorageError, LoadError) as exc:
        raise BuildFailed(str(exc)) from exc


if __name__ == "__main__":
    from weighbridge.workers.compression.command import PROGRAM, app

    app()(prog_name=PROGRAM)
