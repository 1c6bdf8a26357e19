"""Checks that arrays meet their TensorSpecs, and synthetic inputs that do. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weighbridge.engines import datatypes
from weighbridge.engines.errors import InvalidInput
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array, Arrays


def check_inputs(inputs: Arrays, specs: Sequence[TensorSpec]) -> None:
    """Raise InvalidInput when a name, datatype, shape or the common batch size breaks the contract."""
    if len(inputs) != len(specs) or any(spec.name not in inputs for spec in specs):
        names = {spec.name for spec in specs}
        wrong = [f"missing input {name}" for name in sorted(names - inputs.keys())]
        wrong += [f"unknown input {name}" for name in sorted(inputs.keys() - names)]
        raise InvalidInput(f"{', '.join(wrong)}; the model takes {', '.join(sorted(names))}")
    batch: int | None = None
    for spec in specs:
        array = inputs[spec.name]
        if array.dtype != datatypes.to_numpy(spec.datatype):
            raise InvalidInput(f"input {spec.name}: datatype must be {spec.datatype}, not {array.dtype}")
        if not _shaped(array.shape, spec.shape):
            raise InvalidInput(f"input {spec.name}: shape must be {list(spec.shape)}, not {list(array.shape)}")
        if spec.shape and spec.shape[0] == -1:
            batch = array.shape[0] if batch is None else batch
            if array.shape[0] != batch:
                raise InvalidInput(f"input {spec.name}: batch size {array.shape[0]} differs from {batch}")
            if batch == 0:
                raise InvalidInput(f"input {spec.name}: the batch is empty")


def synthetic(specs: Sequence[TensorSpec], *, size: int, seed: int, free: int = 8) -> dict[str, Array]:
    """Random inputs of `size` rows; any other free dimension is `free` long.

    Floats are standard normal; integers are 0 or 1, which every vocabulary contains.
    """
    rng = np.random.default_rng(seed)
    return {spec.name: _draw(rng, spec, size, free) for spec in specs}


def rows(inputs: Mapping[str, Array], start: int, stop: int, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Rows [start, stop) of the inputs that have a batch dimension; the others whole."""
    batched = {spec.name for spec in specs if spec.shape and spec.shape[0] == -1}
    return {name: array[start:stop] if name in batched else array for name, array in inputs.items()}


def _draw(rng: np.random.Generator, spec: TensorSpec, size: int, free: int) -> Array:
    shape = tuple((size if axis == 0 else free) if length == -1 else length for axis, length in enumerate(spec.shape))
    dtype = datatypes.to_numpy(spec.datatype)
    if spec.datatype in ("FP16", "BF16", "FP32", "FP64"):
        return rng.standard_normal(shape).astype(dtype)
    if spec.datatype == datatypes.BYTES:
        raise InvalidInput(f"input {spec.name}: BYTES inputs cannot be synthesised")
    return rng.integers(0, 2, shape).astype(dtype)


def _shaped(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, got) for got, want in zip(shape, wanted, strict=True))
