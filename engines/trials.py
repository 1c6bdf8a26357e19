"""What an exported program is tried with, against the module that it was made of: other lengths, values and rows.

The export saw one example. What its rules of lengths let pass must answer as forward() does; the rest is a bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product

import numpy as np
import torch
from torch import nn

from weighbridge.engines import datatypes, tensors
from weighbridge.engines.errors import TemplateError
from weighbridge.engines.manifest import Length, TensorSpec
from weighbridge.engines.protocols import Array, Arrays
from weighbridge.engines.tensors import Axis

_SHORT = (*range(1, 10), 12, 13, 15, 16, 17, 24, 31, 32, 33)
_LONG = (*(63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 511, 512, 513), *(1000, 1023, 1024, 1025, 2047, 2048, 2049))
_ELEMENTS = 1 << 18
"""Of all inputs of a trial."""
_SECONDS = 15.0
"""No length is tried after them: a large program answers a few long inputs, a small one all."""
_COMBINED = 64
_EXAMPLES, _LAST = (8, 16, 32, 64, 224), (4, 2, 1)
_DISTINCT = (9, 11, 13, 7, 15)

Wished = Mapping[Axis, int]


def examples(specs: Sequence[TensorSpec], rows: int) -> Iterator[dict[str, Array]]:
    """Inputs that a program may suit: free lengths all different first, then all the same, then some twice as long."""
    free = [(spec.name, axis) for spec in specs for axis, length in enumerate(spec.shape) if length == -1 and axis]
    wishes: list[Wished] = [{}]
    if len(free) > 1:
        wishes.insert(0, dict(zip(free, _DISTINCT * len(free), strict=False)))
    if free:
        wishes += [dict.fromkeys(free, length) for length in _EXAMPLES]
    if 1 < len(free) <= 4:
        wishes += [
            {axis: times * 8 + more for axis, (times, more) in zip(free, chosen, strict=True)}
            for chosen in product(((1, 0), (2, 0), (1, 1)), repeat=len(free))
        ]
    if free:
        wishes += [dict.fromkeys(free, length) for length in _LAST]
    for wished in wishes:
        yield drawn(specs, rows, wished)


def drawn(specs: Sequence[TensorSpec], rows: int, wished: Wished, seed: int = 0) -> dict[str, Array]:
    """Inputs within the specs' contract, of these lengths. Integers without a range are 0 and 1."""
    return tensors.synthetic(specs, size=rows, seed=seed, wished=wished)


def positional(specs: Sequence[TensorSpec], arrays: Arrays) -> tuple[torch.Tensor, ...]:
    """The arrays as a program takes them."""
    return tuple(datatypes.array_to_tensor(np.ascontiguousarray(arrays[spec.name])) for spec in specs)


class Trials:
    """`module` (adapted) and `exported`, with the same weights. `failed` is what the module itself raised last."""

    def __init__(self, module: nn.Module, exported: nn.Module | None) -> None:
        self._module, self._exported = module, exported
        self.failed = ""
        self._end = time.monotonic() + _SECONDS

    def eager(self, specs: Sequence[TensorSpec], arrays: Arrays) -> list[torch.Tensor] | None:
        """forward()'s own answer; None where it raises."""
        try:
            with torch.inference_mode():
                return [value.clone() for value in self._module(*positional(specs, _own(arrays)))]
        except TemplateError:
            raise
        except Exception as exc:  # whatever the operator's own forward raises
            self.failed = f"{type(exc).__name__}: {exc}".splitlines()[0]
            return None

    def differs(self, specs: Sequence[TensorSpec], arrays: Arrays, expected: Sequence[torch.Tensor]) -> str:
        """How the exported program's answer is not forward()'s; empty where it is."""
        if self._exported is None:
            return ""
        try:
            with torch.inference_mode():
                seen = list(self._exported(*positional(specs, _own(arrays))))
        except Exception as exc:  # an exported program fails in as many ways as an eager one
            return f"fails where forward() does not: {type(exc).__name__}: {exc}".splitlines()[0]
        for number, (want, got) in enumerate(zip(expected, seen, strict=True)):
            if want.shape != got.shape or want.dtype != got.dtype or not close(want, got):
                return f"answers otherwise than forward() (output {number + 1} of {len(seen)})"
        return ""

    def bounded(
        self, specs: tuple[TensorSpec, ...], base: Axis, outside: str, numbers: Sequence[int] = ()
    ) -> tuple[TensorSpec, ...]:
        """The specs with the rule of `base` as the trials leave it. `outside` says what bounded it, `numbers` are
        lengths where the program may turn another way.

        Raises TemplateError where the exported program differs from forward() at a length that it did not exclude.
        """
        rule = rule_of(specs, base)
        if self.eager(specs, drawn(specs, 2, {})) is None:
            return specs  # it takes no random inputs at all: that says nothing of lengths
        good, bad = {example(rule)}, set[int]()
        for length in self._lengths(specs, base, rule, numbers):
            if (
                bad and length > min((one for one in bad if one > max(good)), default=length)
            ) or time.monotonic() > self._end:
                continue
            arrays = drawn(specs, 2 if length < 64 else 1, {base: length}, seed=length)
            expected = self.eager(specs, arrays)
            if expected is None:
                bad.add(length)
            elif difference := self.differs(specs, arrays, expected):
                if length != 1:
                    raise TemplateError(
                        f"at a length of {length} on axis {base[1]} of {base[0]} the exported program "
                        f"{difference}{outside}"
                    )
                bad.add(length)  # the exporter takes a length of one for a constant of its own
            else:
                good.add(length)
        return with_rule(specs, base, self._narrowed(specs, base, rule, good, bad))

    def combined(self, specs: tuple[TensorSpec, ...], bases: Sequence[Axis], outside: str) -> None:
        """Try lengths that are free each by itself with each other. Raises TemplateError where the export differs."""
        each = [sorted(_near(rule_of(specs, base))) for base in bases]
        for lengths in islice(product(*each), _COMBINED) if len(bases) > 1 else ():
            arrays = drawn(specs, 2, dict(zip(bases, lengths, strict=True)), seed=1)
            expected = self.eager(specs, arrays)
            if expected is not None and (difference := self.differs(specs, arrays, expected)):
                said = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
                raise TemplateError(f"for inputs of {said} the exported program {difference}{outside}")

    def _narrowed(
        self, specs: tuple[TensorSpec, ...], base: Axis, rule: Length, good: set[int], bad: set[int]
    ) -> Length:
        """The rule without what forward() itself refuses: too short, or too long, to the exact length."""
        start = example(rule)
        low = max((length for length in bad if length < start), default=None)
        high = min((length for length in bad if length > start), default=None)
        changes = {}
        if low is not None:
            changes["minimum"] = min(length for length in good if length > low)
        if high is not None:
            known = max(length for length in good if length < high)
            while high - known > rule.step:
                middle = known + (high - known) // (2 * rule.step) * rule.step
                fits = self.eager(specs, drawn(specs, 1, {base: middle})) is not None
                known, high = (middle, high) if fits else (known, middle)
            changes["maximum"] = known
        return rule.model_copy(update=changes)

    def _lengths(self, specs: tuple[TensorSpec, ...], base: Axis, rule: Length, numbers: Sequence[int]) -> list[int]:
        wished = {*_SHORT, *_LONG, rule.minimum, rule.minimum + rule.step}
        wished |= {number + near for number in numbers for near in (-1, 0, 1)}
        wished |= {rule.minimum + times * rule.step for times in (2, 3, 4, 7, 16)}
        wished |= {rule.maximum, rule.maximum - rule.step} if rule.maximum is not None else set()
        fitting = {length for length in wished if allows(rule, length)}
        return [length for length in sorted(fitting) if _size(specs, base, length) <= _ELEMENTS]


def _near(rule: Length) -> set[int]:
    """A few lengths of a rule: its ends, the usual one, and another."""
    wished = (rule.minimum, example(rule), rule.maximum or 0, rule.minimum + 13 * rule.step)
    return {length for length in wished if allows(rule, length) and length <= 64} | {example(rule)}


def close(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether two answers are one, as far as their dtype tells."""
    if not want.is_floating_point():
        return torch.equal(want, got)
    rtol, atol = (3e-2, 1e-2) if want.dtype.itemsize == 2 else (1e-4, 1e-5)
    return torch.allclose(want, got, rtol=rtol, atol=atol, equal_nan=True)


def rule_of(specs: Sequence[TensorSpec], base: Axis) -> Length:
    """The rule of an axis."""
    found = next(
        (rule for spec in specs if spec.name == base[0] for rule in spec.lengths if rule.axis == base[1]), None
    )
    return found or Length(axis=base[1])


def with_rule(specs: Sequence[TensorSpec], base: Axis, rule: Length) -> tuple[TensorSpec, ...]:
    """The specs with another rule of one axis."""
    return tuple(
        spec.model_copy(update={"lengths": tuple(rule if one.axis == base[1] else one for one in spec.lengths)})
        if spec.name == base[0]
        else spec
        for spec in specs
    )


def example(rule: Length) -> int:
    """A length that a rule allows: the one that synthetic inputs have."""
    return tensors.shaped([TensorSpec(name="", datatype="", shape=(1, -1), lengths=(_at(rule, 1),))], 1, {})[""][1]


def allows(rule: Length, length: int) -> bool:
    """Whether a rule lets a length pass."""
    inside = rule.minimum <= length and (rule.maximum is None or length <= rule.maximum)
    return inside and not (length - rule.minimum) % rule.step


def _at(rule: Length, axis: int) -> Length:
    return rule.model_copy(update={"axis": axis})


def _size(specs: Sequence[TensorSpec], base: Axis, length: int) -> int:
    return sum(int(np.prod(shape)) for shape in tensors.shaped(specs, 1, {base: length}).values())


def _own(arrays: Arrays) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}
