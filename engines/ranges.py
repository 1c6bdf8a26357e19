"""Which integers an exported program takes: found where its graph uses them to index (tokens, positions, classes).

Only the little of the graph that leads from the inputs to an index is run, so that a bound is found by search without a
vocabulary-sized computation, and whatever lies between (a clamp, an offset for each column, a remainder) is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

from weighbridge.engines import datatypes
from weighbridge.engines.manifest import Length, TensorSpec, Term, Values
from weighbridge.engines.protocols import Array, Arrays

_aten = torch.ops.aten
_FAR = 2**31
"""What takes values up to here takes them all, as far as anybody asks."""
_LONGEST = 1 << 20
"""Lengths up to here are tried; a table of more positions is no bound that a request would meet."""
_ELEMENTS = 1 << 24
"""Of any tensor on the way to an index while lengths are tried."""
_PLACES = 4096
"""Columns whose bounds are looked for one by one."""
_WRAPS = {"index", "index_put", "index_put_", "_unsafe_index", "take"}
"""Where −1 is the last."""
_ALONG = {  # operator: (argument with the size, its axis or the argument that names it, argument with the indices)
    "embedding": (0, "0", 1),
    "embedding_bag": (0, "0", 1),
    "_embedding_bag": (0, "0", 1),
    **dict.fromkeys(
        (
            *("gather", "index_select", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce"),
            *("scatter_reduce_", "index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_"),
            *("take_along_dim", "index_reduce", "index_reduce_"),
        ),
        (0, "1", 2),
    ),
}


@dataclass(frozen=True)
class _Use:
    """One place that indexes: values from −`size` or 0 up to `size` − 1. `size` may be symbolic."""

    index: fx.Node
    size: Any
    wraps: bool


class IndexUses:
    """The places of a program that index by its integer inputs or by its lengths, and what they take."""

    def __init__(self, program: ExportedProgram, specs: Sequence[TensorSpec]) -> None:
        self._specs, self._module = tuple(specs), program
        names = set(program.graph_signature.user_inputs)
        nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
        self._inputs = dict(zip(nodes, specs, strict=True))
        self._symbols = {
            size.node.expr: (spec.name, axis)
            for node, spec in reversed(self._inputs.items())
            for axis, size in enumerate(node.meta["val"].shape)
            if isinstance(size, torch.SymInt) and not size.node.expr.args
        }
        self._known = _constants(program)
        self._uses = [use for use in _uses(program.graph) if self._leads(use.index) is not None]

    def take(self, arrays: Arrays) -> bool:
        """Whether every index that these inputs lead to is inside what it indexes."""
        values: dict[fx.Node, Any] = {}
        shapes = {name: array.shape for name, array in arrays.items()}
        try:
            return all(self._inside(use, arrays, shapes, values) for use in self._uses)
        except Exception:  # whatever an operator raises for such values
            return False

    def values(self, example: Callable[[Mapping[tuple[str, int], int]], Arrays]) -> dict[str, Values]:
        """The range of each integer input that indexes; `example` gives inputs of wished lengths."""
        found = {}
        for node, spec in self._inputs.items():
            uses = [use for use in self._uses if node in (self._leads(use.index) or ())]
            if uses and spec.datatype.startswith(("INT", "UINT")):
                found[spec.name] = _Search(self, spec, example, _compared(node)).run()
        return {name: its for name, its in found.items() if its != Values()}

    def longest(self, base: tuple[str, int], rule: Length, example: Callable[..., Arrays]) -> int | None:
        """The last length of the rule up to which every index stays inside; None: no table that was asked ends."""

        def fits(length: int) -> bool:
            return self.take(example({base: length}))

        most = min(rule.maximum or _LONGEST, _LONGEST)
        while most > rule.minimum and not self._affordable(example, {base: most}):
            most //= 2
        most = rule.minimum + max(0, most - rule.minimum) // rule.step * rule.step
        if not self._uses or not fits(rule.minimum) or fits(most):
            return rule.maximum
        good, bad = rule.minimum, most
        while bad - good > rule.step:
            middle = good + (bad - good) // (2 * rule.step) * rule.step
            good, bad = (middle, bad) if fits(middle) else (good, middle)
        return good

    def _affordable(self, example: Callable[..., Arrays], wished: Mapping[tuple[str, int], int]) -> bool:
        """Whether what leads to an index stays small: relative positions are a square of the length."""
        shapes = {name: array.shape for name, array in example(wished).items()}
        nodes = {node for use in self._uses for node in self._leads(use.index) or ()}
        values = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
        return all(math.prod(self._size(size, shapes) for size in value.shape) <= _ELEMENTS for value in values)

    def _leads(self, node: fx.Node) -> set[fx.Node] | None:
        """The nodes that an index is computed from; None where weights are among them."""
        seen: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            one = waiting.pop()
            if one in seen:
                continue
            seen.add(one)
            if one.op == "placeholder" and one not in self._inputs and one.name not in self._known:
                return None
            waiting += one.all_input_nodes
        return seen

    def _inside(
        self, use: _Use, arrays: Arrays, shapes: Mapping[str, Sequence[int]], values: dict[fx.Node, Any]
    ) -> bool:
        index = self._value(use.index, arrays, values)
        if (index.dtype in (torch.bool, torch.uint8) and use.wraps) or not index.numel():
            return True
        size = self._size(use.size, shapes)
        low, high = int(index.min()), int(index.max())
        return (-size if use.wraps else 0) <= low and high < size

    def _size(self, size: Any, shapes: Mapping[str, Sequence[int]]) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        return int(size.node.expr.subs({symbol: shapes[name][axis] for symbol, (name, axis) in self._symbols.items()}))

    def _value(self, node: fx.Node, arrays: Arrays, values: dict[fx.Node, Any]) -> Any:
        order = [node]
        while order:  # no recursion: a graph may be deep
            one = order[-1]
            if one in values:
                order.pop()
            elif waiting := [before for before in one.all_input_nodes if before not in values]:
                order += waiting
            else:
                values[one] = self._run(one, arrays, values)
        return values[node]

    def _run(self, node: fx.Node, arrays: Arrays, values: Mapping[fx.Node, Any]) -> Any:
        if node in self._inputs:
            array = arrays[self._inputs[node].name]
            if array.dtype.kind in "fV":  # no index is made of it; its lengths are asked for
                return torch.zeros((), dtype=datatypes.to_torch(self._inputs[node].datatype)).expand(array.shape)
            return datatypes.array_to_tensor(np.ascontiguousarray(array))
        if node.op == "placeholder":
            return self._known[node.name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: values[one])
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """What no checkpoint changes, and integers (positions kept as a buffer), by the placeholder's name."""
    signature = program.graph_signature
    state = {**program.state_dict, **program.constants}
    targets = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    targets |= signature.inputs_to_parameters
    return {
        name: state[target].detach()
        for name, target in targets.items()
        if target in state and (target not in program.state_dict or not state[target].is_floating_point())
    }


def _uses(graph: fx.Graph) -> Iterator[_Use]:
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        args = [*node.args]
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            yield from (
                _Use(index, args[0].meta["val"].shape[axis], wraps=True)
                for axis, index in enumerate(args[1])
                if isinstance(index, fx.Node)
            )
        elif name == "take":
            yield _Use(args[1], args[0].meta["val"].numel(), wraps=True)
        elif name == "one_hot" and len(args) > 1 and isinstance(args[1], int) and args[1] > 0:
            yield _Use(args[0], args[1], wraps=False)
        elif name in _ALONG and len(args) > _ALONG[name][2]:
            holder, axis, index = _ALONG[name]
            along = 0 if axis == "0" else args[1]
            if isinstance(args[index], fx.Node) and isinstance(along, int):
                yield _Use(args[index], args[holder].meta["val"].shape[along], wraps=False)


def _compared(node: fx.Node) -> set[int]:
    """The numbers that a program compares an input with: −100 and the like may have a meaning outside its range."""
    return {
        value
        for user in node.users
        if getattr(user.target, "_schema", None) is not None and user.target._schema.name in ("aten::eq", "aten::ne")  # type: ignore[union-attr]
        for value in user.args
        if isinstance(value, int)
    }


class _Search:
    """The bounds of one input's values, the others being ordinary."""

    def __init__(self, uses: IndexUses, spec: TensorSpec, example: Callable[..., Arrays], compared: set[int]) -> None:
        self._uses, self._spec, self._example, self._compared = uses, spec, example, compared
        self._arrays = dict(example({}))
        self._info = np.iinfo(datatypes.to_numpy(spec.datatype))

    def run(self) -> Values:
        start = next((value for value in (0, 1) if self._takes(value)), None)
        if start is None:
            return Values()
        low, high = self._edge(start, -1), self._edge(start, 1)
        if (below := self._below(start, low, high)) is not None:
            return below
        lows, highs = self._by_place(start, low, -1), self._by_place(start, high, 1)
        also = tuple(
            value
            for value in sorted(self._compared)
            if not (low is None or low <= value) or not (high is None or value <= high)
            if self._takes(value)
        )
        return Values(minimum=lows, maximum=highs, also=also)

    def _takes(self, value: int, places: Array | None = None, start: int = 0, arrays: Arrays | None = None) -> bool:
        if not self._info.min <= value <= self._info.max:
            return False
        given = dict(self._arrays if arrays is None else arrays)
        filled = np.full_like(given[self._spec.name], value if places is None else start)
        if places is not None:
            filled[np.broadcast_to(places, filled.shape)] = value
        given[self._spec.name] = filled
        return self._uses.take(given)

    def _edge(self, start: int, sign: int, places: Array | None = None, arrays: Arrays | None = None) -> int | None:
        """The last value from `start` on that is taken; None: there is no end of its own."""
        end = min(_FAR, self._info.max - start if sign > 0 else start - self._info.min)
        good, step = 0, 1
        while step <= end and self._takes(start + sign * step, places, start, arrays):
            good, step = step, 2 * step
        if step > end and (good == end or self._takes(start + sign * end, places, start, arrays)):
            return None
        bad = min(step, end)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self._takes(start + sign * middle, places, start, arrays) else (good, middle)
        return start + sign * good

    def _below(self, start: int, low: int | None, high: int | None) -> Values | None:
        """The rule, where the bound is a length of the inputs: it moves with that, one for one."""
        free = [
            (spec.name, axis) for spec in self._uses._specs for axis, n in enumerate(spec.shape) if n == -1 and axis
        ]
        for name, axis in free:
            if high is None or self._arrays[name].shape[axis] != high + 1:
                continue
            longer = self._example({(name, axis): high + 1 + 4})
            if longer[name].shape[axis] != high + 5 or self._edge(start, 1, arrays=longer) != high + 4:
                continue
            wraps = low == -(high + 1)
            return Values(minimum=None if wraps or low is None else (low,), below=Term(input=name, axis=axis))
        return None

    def _by_place(self, start: int, edge: int | None, sign: int) -> tuple[int, ...] | None:
        """One bound, or one for each place along the fixed axes where columns differ."""
        if edge is None:
            return None
        shape = [1 if length == -1 else length for length in self._spec.shape]
        count = int(np.prod(shape))
        if not 1 < count <= _PLACES:
            return (edge,)
        masks = [np.arange(count).reshape(shape) == place for place in range(count)]
        if not any(self._takes(edge + sign, mask, start) for mask in masks):
            return (edge,)
        far = self._info.max if sign > 0 else self._info.min
        edges = (self._edge(start, sign, mask) for mask in masks)
        return tuple(far if one is None else one for one in edges)
