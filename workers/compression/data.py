"""Batches for the methods that learn or calibrate: mapped from disk, rows in a fixed random order."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from weighbridge.engines import datatypes, tensors
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array, Arrays, BlobPath
from weighbridge.storage.safetensors_header import Header, MalformedHeader, ShortFile, header_length, parse_header
from weighbridge.workers.compression.types import BuildFailed, Data

LABELS = "labels"


def open_data(specs: Sequence[TensorSpec], *, train: str | None, dataset: str | None, cache: BlobPath) -> Data:
    """The training set, else the evaluation set without its labels (they would leak), else random inputs.

    `train` and `dataset` are digests of safetensors with inputs by name. A file is opened by the first batch;
    `batches` raises BuildFailed for one that does not fit the program. What is short begins again.
    """
    if train is not None:
        rows = _Rows(cache(train), "train.safetensors", specs, labels=True)
        return Data("train", rows.batches, labelled=rows.labelled)
    if dataset is not None:
        return Data("eval", _Rows(cache(dataset), "eval.safetensors", specs, labels=False).batches)
    return Data("synthetic", lambda rows, batch: _synthetic(specs, rows, batch))


class Limited:
    """Data whose batches are at most `limit` rows; it remembers the largest that was asked for."""

    def __init__(self, data: Data, limit: int | None) -> None:
        self.largest = 0
        self.data = replace(data, batches=self._batches)
        self._inner, self._limit = data.batches, limit

    def _batches(self, rows: int, batch: int) -> Iterator[Arrays]:
        size = batch if self._limit is None else min(batch, self._limit)
        self.largest = max(self.largest, min(size, rows))
        return self._inner(rows, size)


@dataclass(frozen=True)
class _Rows:
    path: Path
    name: str
    specs: Sequence[TensorSpec]
    labels: bool

    @property
    def labelled(self) -> bool:
        try:
            return self.labels and LABELS in self._header.tensors
        except BuildFailed:
            return False  # the first batch says what is wrong

    def batches(self, rows: int, batch: int) -> Iterator[Arrays]:
        arrays = self._arrays
        count = len(next(iter(arrays.values())))
        rng = np.random.default_rng(0)
        order = rng.permutation(count)
        for start in range(0, rows, batch):
            wanted = min(batch, rows - start)
            while len(order) < wanted:
                order = np.concatenate([order, rng.permutation(count)])
            chosen, order = order[:wanted], order[wanted:]
            yield {name: np.ascontiguousarray(array[chosen]) for name, array in arrays.items()}

    @cached_property
    def _header(self) -> Header:
        size = self.path.stat().st_size
        try:
            with self.path.open("rb") as file:
                length = header_length(file.read(64 << 10), self.name, size)
                file.seek(8)
                return parse_header(file.read(length), self.name)
        except (MalformedHeader, ShortFile) as wrong:
            raise BuildFailed(f"{self.name}: {wrong}") from wrong

    @cached_property
    def _arrays(self) -> dict[str, Array]:
        header = self._header
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(mapped) != header.expected_size:
            raise BuildFailed(f"{self.name} has {len(mapped):,} bytes, {header.expected_size:,} by its header")
        found = {spec.name: self._array(header, mapped, spec.name) for spec in self.specs}
        for spec in self.specs:
            self._check(spec, found[spec.name])
        if self.labelled:
            found[LABELS] = self._array(header, mapped, LABELS)
        counts = {name: len(array) for name, array in found.items()}
        if len(set(counts.values())) != 1 or not min(counts.values()):
            raise BuildFailed(f"{self.name}: each tensor needs one row an example; there are {counts}")
        return found

    def _array(self, header: Header, mapped: mmap.mmap, name: str) -> Array:
        info = header.tensors.get(name)
        if info is None:
            raise BuildFailed(f"{self.name}: {name} is missing")
        try:
            dtype = datatypes.to_numpy(datatypes.from_safetensors(info.dtype))
        except KeyError as exc:
            raise BuildFailed(f"{self.name}: {name} is {info.dtype}, which is no input's datatype") from exc
        count = int(np.prod(info.shape, dtype=np.int64))
        offset = header.data_start + info.start
        return np.frombuffer(mapped, dtype=dtype, count=count, offset=offset).reshape(info.shape)

    def _check(self, spec: TensorSpec, array: Array) -> None:
        fits = len(array.shape) == len(spec.shape) and spec.shape[:1] == (-1,)
        fits = fits and all(want in (-1, got) for got, want in zip(array.shape, spec.shape, strict=True))
        if not fits or array.dtype != datatypes.to_numpy(spec.datatype):
            said = f"{array.dtype}{list(array.shape)}"
            raise BuildFailed(
                f"{self.name}: {spec.name} is {said}, the program takes {spec.datatype}{list(spec.shape)}"
            )


def _synthetic(specs: Sequence[TensorSpec], rows: int, batch: int) -> Iterator[Arrays]:
    for number, start in enumerate(range(0, rows, batch)):
        yield tensors.synthetic(specs, size=min(batch, rows - start), seed=number + 1)
