"""Checks that arrays meet their TensorSpecs, and synthetic inputs that do. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from weighbridge.engines import datatypes
from weighbridge.engines.errors import InvalidInput
from weighbridge.engines.manifest import Length, TensorSpec, Values
from weighbridge.engines.protocols import Array, Arrays

Axis = tuple[str, int]
"""The name of an input and the number of its axis."""


def check_inputs(inputs: Arrays, specs: Sequence[TensorSpec]) -> None:
    """Raise InvalidInput, which names the input, the bound and what was seen, when something breaks the contract.

    Names, datatypes, shapes, the common batch size; then the lengths and values that the program takes.
    """
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
    shapes = {name: array.shape for name, array in inputs.items()}
    for spec in specs:
        for rule in spec.lengths:
            _check_length(spec.name, rule, shapes)
        if spec.values is not None and inputs[spec.name].size:
            _check_values(spec, spec.values, inputs[spec.name], shapes)


def told(specs: Sequence[TensorSpec]) -> list[str]:
    """The contract in words, a line for each rule."""
    lines = []
    for spec in specs:
        lines += [f"input {spec.name}: axis {rule.axis} is {_told(rule)}" for rule in spec.lengths]
        if (values := spec.values) is not None and values.below is not None:
            lines.append(
                f"input {spec.name}: values below the length of axis {values.below.axis} of {values.below.input}"
            )
        elif values is not None:
            low, high = (one or ("any",) for one in (values.minimum, values.maximum))
            more = "".join(f" or {value}" for value in values.also)
            both = zip(
                low * len(high) if len(low) == 1 else low, high * len(low) if len(high) == 1 else high, strict=True
            )
            lines.append(f"input {spec.name}: values {', '.join(f'{a} to {b}' for a, b in both)}{more}")
    return lines


def _told(rule: Length) -> str:
    if rule.of:
        return f"as long as {_sum(rule)}"
    most = f" to {rule.maximum}" if rule.maximum is not None else " on"
    steps = f" in steps of {rule.step}" if rule.step > 1 else ""
    return f"from {rule.minimum}{most} long{steps}"


def _sum(rule: Length) -> str:
    terms = (f"{f'{term.times} · ' if term.times != 1 else ''}axis {term.axis} of {term.input}" for term in rule.of)
    return " + ".join(terms) + (f" {'+' if rule.plus > 0 else '-'} {abs(rule.plus)}" if rule.plus else "")


def _check_length(name: str, rule: Length, shapes: Mapping[str, tuple[int, ...]]) -> None:
    seen = shapes[name][rule.axis]
    if rule.of:
        wanted = derived(rule, shapes)
        if seen != wanted:
            raise InvalidInput(f"input {name}: axis {rule.axis} must be {wanted} long ({_sum(rule)}), not {seen}")
    elif seen < rule.minimum:
        raise InvalidInput(f"input {name}: axis {rule.axis} must be at least {rule.minimum} long, not {seen}")
    elif rule.maximum is not None and seen > rule.maximum:
        raise InvalidInput(f"input {name}: axis {rule.axis} must be at most {rule.maximum} long, not {seen}")
    elif (seen - rule.minimum) % rule.step:
        steps = f"{rule.minimum}, {rule.minimum + rule.step}, {rule.minimum + 2 * rule.step} …"
        raise InvalidInput(f"input {name}: axis {rule.axis} must be {steps} long, not {seen}")


def derived(rule: Length, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The length that a rule with `of` demands."""
    return rule.plus + sum(term.times * shapes[term.input][term.axis] for term in rule.of)


def _check_values(spec: TensorSpec, values: Values, array: Array, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Two passes over an input that is as it should be; more only over one that is not."""
    low, high = bounds(spec, shapes)
    if (low.ndim or high.ndim) and ((array >= low) & (array <= high)).all():
        return
    if not (low.ndim or high.ndim) and int(low) <= int(array.min()) and int(array.max()) <= int(high):
        return
    outside = (array < low) | (array > high)
    if values.also:
        outside &= ~np.isin(array, values.also)
    if outside.any():
        place = np.argwhere(outside)[0]
        least, most = (int(np.broadcast_to(bound, array.shape)[tuple(place)]) for bound in (low, high))
        said = "".join(f" or {value}" for value in values.also)
        raise InvalidInput(
            f"input {spec.name}: values must be from {least} to {most}{said}, not {int(array[tuple(place)])}"
            f" (at {place.tolist()})"
        )


def bounds(spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Array, Array]:
    """The least and the largest value of an integer input, each one number or one for each place along fixed axes."""
    values, info = spec.values or Values(), np.iinfo(datatypes.to_numpy(spec.datatype))
    low = _placed(spec, (info.min,) if values.minimum is None else values.minimum)
    high = _placed(spec, (info.max,) if values.maximum is None else values.maximum)
    if values.below is not None:
        length = shapes[values.below.input][values.below.axis]
        high = np.asarray(length - 1)
        low = np.asarray(max(-length, info.min)) if values.minimum is None else low
    return low, high


def _placed(spec: TensorSpec, found: tuple[int, ...]) -> Array:
    if len(found) == 1:
        return np.asarray(found[0])
    return np.asarray(found).reshape([1 if length == -1 else length for length in spec.shape])


def synthetic(
    specs: Sequence[TensorSpec], *, size: int, seed: int, free: int = 8, wished: Mapping[Axis, int] | None = None
) -> dict[str, Array]:
    """Random inputs of `size` rows within the contract; free dimensions are as wished, else about `free` long.

    Floats are standard normal; integers are of the whole range where one is known, else 0 or 1, which every
    vocabulary contains.
    """
    rng = np.random.default_rng(seed)
    shapes = shaped(specs, size, wished or {}, free)
    return {spec.name: _draw(rng, spec, shapes) for spec in specs}


def shaped(
    specs: Sequence[TensorSpec], size: int, wished: Mapping[Axis, int], free: int = 8
) -> dict[str, tuple[int, ...]]:
    """The shapes of inputs of `size` rows whose free axes are as wished, {(input, axis): length}, else about `free`."""
    shapes = {spec.name: [size if axis == 0 and n == -1 else n for axis, n in enumerate(spec.shape)] for spec in specs}
    rules = {(spec.name, rule.axis): rule for spec in specs for rule in spec.lengths}
    for name, shape in shapes.items():
        for axis, length in enumerate(shape):
            if length == -1:
                shape[axis] = wished.get((name, axis), _nearest(free, rules.get((name, axis), Length(axis=axis))))
    for (name, axis), rule in rules.items():
        if rule.of:
            shapes[name][axis] = derived(rule, {name: tuple(shape) for name, shape in shapes.items()})
    return {name: tuple(shape) for name, shape in shapes.items()}


def _nearest(wanted: int, rule: Length) -> int:
    most = wanted if rule.maximum is None else min(wanted, rule.maximum)
    return rule.minimum + max(0, most - rule.minimum) // rule.step * rule.step


def lengths(specs: Sequence[TensorSpec], wanted: int) -> dict[Axis, int]:
    """A length near `wanted` for each axis whose length is a choice."""
    return {(spec.name, rule.axis): _nearest(wanted, rule) for spec in specs for rule in spec.lengths if not rule.of}


def rows(inputs: Mapping[str, Array], start: int, stop: int, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Rows [start, stop) of the inputs that have a batch dimension; the others whole."""
    batched = {spec.name for spec in specs if spec.shape and spec.shape[0] == -1}
    return {name: array[start:stop] if name in batched else array for name, array in inputs.items()}


def _draw(rng: np.random.Generator, spec: TensorSpec, shapes: Mapping[str, tuple[int, ...]]) -> Array:
    shape, dtype = shapes[spec.name], datatypes.to_numpy(spec.datatype)
    if spec.datatype in ("FP16", "BF16", "FP32", "FP64"):
        return rng.standard_normal(shape).astype(dtype)
    if spec.datatype == datatypes.BYTES:
        raise InvalidInput(f"input {spec.name}: BYTES inputs cannot be synthesised")
    if spec.values is None:
        return rng.integers(0, 2, shape).astype(dtype)
    low, high = bounds(spec, shapes)
    least = np.maximum(low, np.minimum(0, high))
    most = high if spec.values.maximum or spec.values.below else np.maximum(1, least)
    return rng.integers(least, most, shape, endpoint=True).astype(dtype)


def _shaped(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, got) for got, want in zip(shape, wanted, strict=True))
