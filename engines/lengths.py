"""Which lengths an exported program is for: what the exporter assumed, kept as rules of the inputs' free axes.

The exporter gives each free axis a symbol or a sum of symbols (equal symbols: equal lengths; 2·s: twice as long) and
writes down what its path through the program took for granted (`ids.size()[1] <= 12`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]  # torch's own symbols
import torch
from torch import fx
from torch.export import ExportedProgram

from weighbridge.engines import purity
from weighbridge.engines.calling import identifiers
from weighbridge.engines.errors import TemplateError
from weighbridge.engines.manifest import Length, TensorSpec, Term
from weighbridge.engines.tensors import Axis

_TRIED = 2048
"""Lengths from 1 to here are asked of the guards, one by one."""
_STEPS = 128
_SAYS_NOTHING = re.compile(r"!=|\.stride\(\)|\.storage_offset\(\)")
"""Of a guard: 'not the special case' (a length of 1 broadcasts, a stride coincides), which the general code answers."""

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Assumed:
    """What an export took for granted of inputs `specs`, which carry it as rules."""

    specs: tuple[TensorSpec, ...]
    bases: tuple[Axis, ...]
    """The axes, besides the batch, whose length is a choice."""
    fixed: tuple[Axis, ...]
    """Those declared free that the program takes at the example's length only."""
    guards: tuple[str, ...]
    lines: tuple[str, ...]
    """The operator's own lines that they come from."""
    unread: tuple[str, ...]
    """The inputs that the program never reads."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the guards compare lengths with: where another path may begin."""
        return tuple(int(number) for guard in self.guards for number in re.findall(r"(?<![\w\[])\d+(?![\w\]])", guard))

    def __str__(self) -> str:
        """The end of a message: what was assumed, and where."""
        said = "; ".join(guard for guard in self.guards[:3])
        at = f" ({', '.join(self.lines)})" if self.lines else ""
        return f"; the export assumed {said}{at}" if said else ""


def assumed(program: ExportedProgram, specs: Sequence[TensorSpec], example: Shapes) -> Assumed:
    """Read the rules out of an export that was made with inputs of these shapes. Raises TemplateError."""
    names = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    sizes = {spec.name: node.meta["val"].shape for spec, node in zip(specs, nodes, strict=True)}
    free = [(spec.name, axis) for spec in specs for axis, length in enumerate(spec.shape) if length == -1]
    expressions = {(name, axis): _expression(sizes[name][axis]) for name, axis in free}
    bases: dict[sympy.Symbol, Axis] = {}
    for axis, expression in expressions.items():
        if isinstance(expression, sympy.Symbol):
            bases.setdefault(expression, axis)
    guards = tuple(code for code in getattr(program, "_guards_code", None) or ())
    asks = _Guards(guards, dict(zip((spec.name for spec in specs), identifiers(specs), strict=True)))
    lengths = {axis: example[axis[0]][axis[1]] for axis in free}
    rules: dict[Axis, Length] = {}
    for axis, expression in expressions.items():
        if isinstance(expression, int):
            rules[axis] = Length(axis=axis[1], minimum=expression, maximum=expression)
        elif bases.get(expression) != axis:
            rules[axis] = _derived(axis, expression, bases)
        elif axis[1]:
            rules[axis] = _chosen(axis, program.range_constraints.get(expression), asks, expressions, bases, lengths)
    made = tuple(
        spec.model_copy(
            update={"lengths": tuple(rules[key] for key in free if key[0] == spec.name and _says(rules, key))}
        )
        for spec in specs
    )
    fixed = tuple(axis for axis, expression in expressions.items() if isinstance(expression, int))
    unread = tuple(spec.name for spec, node in zip(specs, nodes, strict=True) if not node.users)
    told = tuple(code for code in guards if not _SAYS_NOTHING.search(code) or re.search(r"!= ([2-9]|\d\d)", code))
    return Assumed(made, tuple(axis for axis in bases.values() if axis[1]), fixed, told, _lines(nodes), unread)


def _lines(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """The lines of the operator's code (model.py:12) where the exporter branched on a length."""
    modes = [getattr(node.meta.get("val"), "fake_mode", None) for node in nodes]
    environment = next((mode.shape_env for mode in modes if mode is not None), None)
    found = []
    for guard in getattr(environment, "guards", None) or ():
        frame: Any = getattr(guard.sloc, "user_loc", None) or getattr(guard.sloc, "framework_loc", None)
        if hasattr(frame, "lineno") and not frame.filename.startswith(purity.TORCH):
            found.append(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}")
    return tuple(dict.fromkeys(found))[:3]


def _says(rules: Mapping[Axis, Length], key: Axis) -> bool:
    """The batch is one for all inputs already."""
    rule = rules.get(key)
    return rule is not None and not (key[1] == 0 and rule.of and rule.of[0].axis == 0 and len(rule.of) == 1)


def _expression(size: Any) -> Any:
    """An int, a symbol, or a sympy sum."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    return int(expression) if isinstance(expression, int) or expression.is_Integer else expression


def _derived(axis: Axis, expression: Any, bases: Mapping[Any, Axis]) -> Length:
    """The rule of an axis that is a sum of others. Raises TemplateError."""
    symbols = sorted(expression.free_symbols, key=str)
    terms = []
    for symbol in symbols:
        times = expression.coeff(symbol)
        if symbol not in bases or not times.is_Integer:
            raise TemplateError(f"axis {axis[1]} of {axis[0]} is {expression} long: no relation that can be kept")
        terms.append(Term(input=bases[symbol][0], axis=bases[symbol][1], times=int(times)))
    rest = expression - sum(expression.coeff(symbol) * symbol for symbol in symbols)
    if not rest.is_Integer:
        raise TemplateError(f"axis {axis[1]} of {axis[0]} is {expression} long: no relation that can be kept")
    return Length(axis=axis[1], of=tuple(terms), plus=int(rest))


def _chosen(
    axis: Axis,
    limits: Any,
    asks: _Guards,
    expressions: Mapping[Axis, Any],
    bases: Mapping[Any, Axis],
    example: Mapping[Axis, int],
) -> Length:
    """The longest run of lengths around the example's, in equal steps, that the guards let pass."""
    most = int(limits.upper) if limits is not None and limits.upper.is_finite and limits.upper < 2**31 else None
    at = example[axis]
    top = min(_TRIED, most) if most is not None else max(_TRIED, 2 * at)
    chosen = {symbol: example[base] for symbol, base in bases.items()}
    symbol = next(symbol for symbol, base in bases.items() if base == axis)

    def passes(length: int) -> bool:
        values = {**chosen, symbol: length}
        return asks.pass_at(
            {key: one if isinstance(one, int) else int(one.subs(values)) for key, one in expressions.items()}
        )

    good = {length for length in range(1, top + 1) if passes(length)} | {at} if asks.any else set(range(1, top + 1))
    low, high, step = max((_run(good, at, step) for step in range(1, _STEPS + 1)), key=lambda run: _count(run))
    return Length(axis=axis[1], minimum=low, maximum=most if high + step > top else high, step=step)


def _run(good: set[int], at: int, step: int) -> tuple[int, int, int]:
    low = high = at
    while low - step in good:
        low -= step
    while high + step in good:
        high += step
    return low, high, step


def _count(run: tuple[int, int, int]) -> int:
    low, high, step = run
    return (high - low) // step


class _Guards:
    """The exporter's conditions: Python expressions of `L['name'].size()[axis]`, by this process's own torch."""

    def __init__(self, guards: Sequence[str], names: Mapping[str, str]) -> None:
        self._names = names
        self._codes = [compile(code, "<guard>", "eval") for code in guards if not _SAYS_NOTHING.search(code)]

    @property
    def any(self) -> bool:
        return bool(self._codes)

    def pass_at(self, lengths: Mapping[Axis, int]) -> bool:
        sizes: dict[str, _Sized] = {self._names[name]: _Sized() for name, _ in lengths}
        for (name, axis), length in lengths.items():
            sizes[self._names[name]][axis] = length
        return all(self._passes(code, sizes) for code in self._codes)

    def _passes(self, code: Any, sizes: Mapping[str, _Sized]) -> bool:
        try:
            return bool(eval(code, {"__builtins__": {"max": max, "min": min, "abs": abs}}, {"L": sizes}))
        except ZeroDivisionError:
            return False
        except Exception:  # it speaks of something else than free lengths: the trials decide
            return True


class _Sized(dict[int, int]):
    def size(self) -> dict[int, int]:
        return self
