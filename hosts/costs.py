"""What a request takes of an engine child: measured when a version is loaded, known before a request is computed.

A unit is a row where the program has rows (axis 0 free in every input and output), else the whole request. A unit's
memory is fitted as a·e + c·e² over its elements e, because attention grows with the square of a length, and learned
upwards where a unit turns out to take more. Blocks are powers of two of units, so that a large request is cut the
same way each time on one child. What does not belong here: sockets, frames, and the limit that the kernel keeps.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array, Session
from weighbridge.hosts import batching
from weighbridge.hosts.errors import TooCostly
from weighbridge.hosts.meter import Meter

Inputs = Mapping[str, Array]

BLOCK_SECONDS = 0.05
"""How long a block of a large request may be computed before others get their turn."""
SAFETY = 1.5
"""Times what was measured."""
_TELLING = 8 << 20
"""Growth of memory, bytes, from which on a measurement says more than its noise."""
_MOST_ROWS, _MOST_ELEMENTS = 1 << 14, 1 << 22
_JSON_BYTES = 24
"""Of one number in an answer's JSON."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes and seconds of one unit of e elements: `linear`·e + `square`·e², `seconds`·e."""

    linear: float = 0.0
    square: float = 0.0
    seconds: float = 0.0
    answer: float = 0.0
    """Bytes of the outputs for each element of the inputs."""

    def bytes(self, elements: int) -> float:
        return elements * (self.linear + self.square * elements)


@dataclass
class Costs:
    """Answers how much of a request is computed at once; `budget` bytes is what one may take, 0: anything."""

    budget: int = 0
    rows: bool = False
    """Whether the program has rows, so that a request can be cut."""
    curve: Curve = field(default_factory=Curve)
    _learned: dict[int, float] = field(default_factory=dict)
    """Bytes of a unit by its elements, where it took more than the curve says."""

    def __post_init__(self) -> None:
        self._small = self._most_small()

    def small(self, inputs: Inputs) -> bool:
        """Whether a request is one cheap block whatever its shape: most are, and need no more arithmetic than this."""
        return sum([array.size for array in inputs.values()]) <= self._small

    def units(self, inputs: Inputs) -> tuple[int, int]:
        """(units, elements of one). What breaks the contract is one unit: the engine says what is wrong with it."""
        elements = sum(array.size for array in inputs.values())
        count = batching.row_count(inputs) if self.rows else 0
        return (count, -(-elements // count)) if count else (1, elements)

    def at_once(self, elements: int) -> int:
        """Units that make one block: within the budget and within BLOCK_SECONDS. Raises TooCostly for not even one.

        Only the curve refuses. What was learned came with one request's values, and must not shut others out.
        """
        price = SAFETY * self.curve.bytes(elements)
        if self.budget and price > self.budget:
            unit = "a row" if self.rows else "an input"
            raise TooCostly(
                f"{unit} of {elements} elements takes about {price / 1e6:,.0f} MB, this "
                f"host gives a request {self.budget / 1e6:,.0f} MB: at most {self._fitting(elements)} elements fit"
            )
        each = max(price, SAFETY * self._learned.get(elements, 0.0))
        fitting = self.budget / each if each and self.budget else float(_MOST_ROWS)
        if self.curve.seconds:
            fitting = min(fitting, BLOCK_SECONDS / (self.curve.seconds * elements))
        return 1 << max(0, int(fitting).bit_length() - 1)

    def demand(self, units: int, elements: int, given: int, *, json: bool) -> int:
        """Bytes that the request holds to its end. Raises TooCostly with the rows that fit.

        `given`: bytes of the decoded inputs; `json`: whether the outputs are written as JSON.
        """
        answer = self.curve.answer * elements * (1 + _JSON_BYTES / 4 if json else 1)
        block = min(units, self.at_once(elements)) * SAFETY * self.curve.bytes(elements)
        need = given + units * answer + block
        if self.budget and need > self.budget:
            fit = max(0, int((self.budget - block) / (given / units + answer)))
            raise TooCostly(
                f"{units} rows with their answers take about {need / 1e6:,.0f} MB, this host gives a request "
                f"{self.budget / 1e6:,.0f} MB: at most {fit} rows of this size fit"
            )
        return int(need)

    def learn(self, units: int, elements: int, grown: int) -> None:
        """Take over that so many units took `grown` bytes more; only ever upwards."""
        each = grown / units
        if each > self.curve.bytes(elements):
            self._learned[elements] = max(each, self._learned.get(elements, 0.0))

    def outgrew(self, units: int, elements: int) -> None:
        """So many units at once did not fit: half of them may be tried."""
        if self.budget and units > 1:
            self._learned[elements] = max(2 * self.budget / units / SAFETY, self._learned.get(elements, 0.0))

    def telling(self, units: int, elements: int) -> bool:
        """Whether so many units are enough to learn from."""
        return units * self.curve.bytes(elements) >= _TELLING

    def _fitting(self, elements: int) -> int:
        """The most elements of one unit within the budget."""
        return _most(lambda some: SAFETY * self.curve.bytes(some) <= self.budget, elements)

    def _most_small(self) -> int:
        """Elements of one unit, the dearest way to have so many, that are too cheap to learn from."""

        def cheap(some: int) -> bool:
            price = SAFETY * self.curve.bytes(some)
            return price <= min(_TELLING, self.budget) and some * self.curve.seconds <= BLOCK_SECONDS

        return _most(cheap, _MOST_ELEMENTS) if self.budget else 0


def _most(holds: Callable[[int], bool], highest: int) -> int:
    """The largest number up to `highest` that it holds for, by halving; it holds for all below."""
    return bisect_left(range(1, highest + 1), True, key=lambda some: not holds(some))


def measure(session: Session, inputs: Inputs, budget: int, meter: Meter, *, seconds: float = 0.5) -> Costs:
    """Price a loaded version with its golden's inputs, repeated along the rows, then along the free lengths.

    It ends within about `seconds`, and no try takes more than a sixteenth of the budget; a program that refuses more
    rows or another length is priced by what it takes.
    """
    rows = batching.batchable(session)
    until, costs = time.monotonic() + seconds, Costs(budget, rows)
    if not budget:
        return costs
    points: list[_Point] = []
    for tried in _tries(inputs, session.inputs, rows):
        largest: _Point | None = None
        for sample in tried:
            if (point := _tried(session, sample, costs, meter)) is None:
                break
            largest = point
            if point.grown >= min(_TELLING, budget / 16) or point.seconds >= BLOCK_SECONDS or time.monotonic() > until:
                break
        points += [largest] if largest is not None else []
    return Costs(budget, rows, _fit(points))


@dataclass(frozen=True, slots=True)
class _Point:
    units: int
    elements: int
    grown: int
    seconds: float
    answer: int


def _tries(inputs: Inputs, specs: tuple[TensorSpec, ...], rows: bool) -> Iterator[Iterator[Inputs]]:
    """Ever larger inputs: more rows; then longer rows where lengths are free."""
    if rows:
        yield (_repeated(inputs, specs, 0, times) for times in (4**n for n in range(1, 12)))
    free = {axis for spec in specs for axis, size in enumerate(spec.shape) if size == -1 and (axis or not rows)}
    if free:
        yield (_longer(inputs, specs, free, times) for times in (4**n for n in range(1, 8)))


def _longer(inputs: Inputs, specs: tuple[TensorSpec, ...], axes: set[int], times: int) -> Inputs:
    for axis in axes:
        inputs = _repeated(inputs, specs, axis, times)
    return inputs


def _repeated(inputs: Inputs, specs: tuple[TensorSpec, ...], axis: int, times: int) -> Inputs:
    """Every input that is free along `axis` repeated there; the values stay those that the program is known to take."""
    free = {spec.name for spec in specs if len(spec.shape) > axis and spec.shape[axis] == -1}
    return {
        name: np.concatenate([array] * times, axis) if name in free and array.size * times <= _MOST_ELEMENTS else array
        for name, array in inputs.items()
    }


def _tried(session: Session, sample: Inputs, costs: Costs, meter: Meter) -> _Point | None:
    units, elements = costs.units(sample)
    if units * elements > _MOST_ELEMENTS:
        return None
    try:
        session.infer(sample)  # the first time prepares what stays: packed weights, pages of the file
        outputs, grown, seconds = meter.of(lambda: session.infer(sample))
    except Exception:  # it takes no more than before: that is all there is to know
        return None
    return _Point(units, elements, grown, seconds, sum(array.nbytes for array in outputs.values()))


def _fit(points: list[_Point]) -> Curve:
    """A curve through one or two measured sizes of a unit, never below either; zero where nothing was measured."""
    if not points:
        return Curve()
    seconds = max(point.seconds / (point.units * point.elements) for point in points if point.elements)
    answer = max(point.answer / (point.units * point.elements) for point in points if point.elements)
    each = sorted((point.elements, point.grown / point.units) for point in points)
    (small, first), (large, last) = each[0], each[-1]
    linear = max(first / small, 0.0)
    if large == small or last / large <= linear:
        return Curve(max(linear, last / large), 0.0, seconds, answer)
    square = (last / large - linear) / (large - small)
    return Curve(max(0.0, linear - square * small), square, seconds, answer)
