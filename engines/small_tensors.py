"""Many small tensors looked at together: one by one, a checkpoint of 200,000 numbers took seconds of a processor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch

from weighbridge.engines.tensor_stats import FLOATS, WORDS, TensorStats, width
from weighbridge.storage.safetensors_header import TensorInfo

_SMALL, _MOST = 4096, 1 << 18
"""Bytes of one tensor, and of all that are looked at together; a look takes some 60 bytes for each of these."""
_FEW = 16
"""Fewer than these are looked at one by one as quickly."""

Named = tuple[str, TensorInfo]
Array = np.ndarray[Any, Any]


def run(tensors: Sequence[Named], first: int, size: int) -> Sequence[Named]:
    """Those from `first` on that lie in the next `size` bytes and are small; none where they are few."""
    start, end = tensors[first][1].start, first
    most = start + min(size, _MOST)
    for _, info in islice(tensors, first, None):
        if info.end - info.start > _SMALL or info.end > most:
            break
        end += 1
    return tensors[first:end] if end - first >= _FEW else ()


def look(tensors: Sequence[Named], data: memoryview, data_start: int) -> list[TensorStats]:
    """The statistics of a `run`, whose bytes `data` is."""
    found: dict[str, TensorStats] = {}
    begin, groups = tensors[0][1].start, defaultdict[str, list[Named]](list)
    for one in tensors:
        groups[one[1].dtype if one[1].end > one[1].start else ""].append(one)  # the empty ones have no first word
    for name, info in groups.pop("", ()):
        found[name] = TensorStats(name, info.dtype, info.shape, 0, 0, 0, None, None, None, data_start + info.start)
    for group in groups.values():
        parts = bytearray().join(data[info.start - begin : info.end - begin] for _, info in group)
        found.update((one.name, one) for one in _alike(group, parts, data_start))
    return [found[name] for name, _ in tensors]


def _alike(tensors: Sequence[Named], data: bytearray, data_start: int) -> Iterable[TensorStats]:
    """Of tensors of one dtype, none of them empty."""
    infos = [info for _, info in tensors]
    wide = width(infos[0])
    words: Array = np.frombuffer(data, dtype=WORDS[wide])
    ends = np.cumsum([info.end - info.start for info in infos]) // wide
    starts = np.r_[0, ends[:-1]]
    none, tails, holes = _zeros(words, starts, ends)
    nonfinite, lows, highs, rms = _values(words, starts, FLOATS.get(infos[0].dtype))
    return map(
        TensorStats,
        (name for name, _ in tensors),
        (info.dtype for info in infos),
        (info.shape for info in infos),
        (info.end - info.start for info in infos),
        nonfinite,
        (min(math.prod(info.shape), zeros) for info, zeros in zip(infos, none.tolist(), strict=True)),
        lows,
        highs,
        rms,
        (data_start + info.start for info in infos),
        repeat(False),
        (tails * wide).tolist(),
        (holes * wide).tolist(),
    )


def _zeros(words: Array, starts: Array, ends: Array) -> tuple[Array, Array, Array]:
    """Of each tensor how many words are zero, how many at its end, and how many before its first other."""
    nonzero, places = words != 0, np.arange(len(words))
    first = np.minimum.reduceat(np.where(nonzero, places, len(words)), starts)
    last = np.maximum.reduceat(np.where(nonzero, places, -1), starts)
    count = np.add.reduceat(nonzero, starts, dtype=np.int64)
    size = ends - starts
    return size - count, np.where(count, ends - 1 - last, size), np.where(count, first - starts, 0)


def _values(words: Array, starts: Array, kind: torch.dtype | None) -> tuple[Iterable[Any], ...]:
    """Of each tensor how many values are not finite, and least, greatest and root mean square of the rest."""
    if kind is None:
        return repeat(0), repeat(None), repeat(None), repeat(None)
    looked = torch.from_numpy(words.view(np.int8)).view(kind)
    values = (looked.float() if kind.itemsize == 1 else looked).double().numpy()
    finite = np.isfinite(values)
    count = np.add.reduceat(finite, starts, dtype=np.int64)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    with np.errstate(over="ignore"):
        squares = np.add.reduceat(np.square(np.where(finite, values, 0.0)), starts)
    rms = np.sqrt(squares / np.maximum(count, 1))
    sizes = np.diff(np.r_[starts, len(words)])
    return ((sizes - count).tolist(), *(_known(column, count) for column in (low, high, rms)))


def _known(column: Array, count: Array) -> list[float | None]:
    """As plain numbers; None where no value was finite."""
    return [value if known else None for value, known in zip(column.tolist(), count.tolist(), strict=True)]
