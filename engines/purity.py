"""A program is a pure function: the same input has the same answer, whatever was asked before and beside it.

Whoever adds a template, and whoever validates weights, asks the same questions: x, y, x again; a row alone and in its
batch; and whether anything that the module holds has changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from weighbridge.engines import tensors
from weighbridge.engines.errors import ImpureProgram
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array, Arrays

Answer = Callable[[Arrays], Mapping[str, Array]]
ROWS = (1e-3, 1e-3)
"""(rtol, share of the largest) by which a row may answer otherwise in a batch: kernels sum in other orders."""
REPEATED = 1e-5
"""The same of an answer given twice."""
TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)
_TORCHS = frozenset(vars(nn.Module()))
"""What every module holds, besides what its author gave it."""
_PLAIN = (bool, int, float, str, type(None))


def ask(
    answer: Answer,
    first: Arrays,
    second: Arrays,
    module: nn.Module | None,
    untouched: Mapping[str, list[Any]] | None = None,
) -> None:
    """Raise ImpureProgram unless `answer` is a function of its inputs alone; `module` is what it runs, if known.

    `untouched`: what the module's parameters and buffers were before it was ever called.
    """
    whole = untouched is not None  # of weights in use, sums would cost as much as reading them again
    before = {**held(module, parameters=whole), **(untouched or {})}
    own = {name: array.copy() for name, array in first.items()}
    x = _copied(answer(first))
    if changed := [
        name for name in own if not np.array_equal(own[name], first[name], equal_nan=own[name].dtype.kind == "f")
    ]:
        raise ImpureProgram(f"forward() changes its input {changed[0]} in place: make a new tensor of it instead")
    y = _copied(answer(second))
    again_x, again_y, third_y = (_copied(answer(one)) for one in (own, second, second))
    if changed := [
        name for name, value in held(module, parameters=whole).items() if not _same(before.get(name), value)
    ]:
        raise ImpureProgram(
            f"forward() changes {changed[0]}: one request would change the answer to the next; a program keeps nothing"
        )
    pairs = ((x, again_x), (y, again_y), (y, third_y))
    if name := next((name for one, two in pairs if (name := _differs(one, two, REPEATED))), ""):
        raise ImpureProgram(
            f"output {name} is random: the same input has another answer when it is asked again (dropout left on, "
            "random numbers, or something kept from the request before)"
        )


def ask_rows(answer: Answer, specs: Sequence[TensorSpec], inputs: Arrays) -> None:
    """Raise ImpureProgram unless each row answers alone as it does in its batch."""
    whole = _copied(answer(inputs))
    batched = [spec.name for spec in specs if spec.shape and spec.shape[0] == -1]
    count = inputs[batched[0]].shape[0] if batched else 0
    for start in range(count if count > 1 else 0):
        alone = answer(tensors.rows(inputs, start, start + 1, specs))
        wanted = {
            name: value[start : start + 1] if value.shape != alone[name].shape else value
            for name, value in whole.items()
        }
        if name := _differs(wanted, alone, ROWS[0]):
            raise ImpureProgram(
                f"output {name} of a row alone is not that of the same row in a batch: rows influence each other "
                "(a batch norm in training mode, a mean over the batch)"
            )


def held(module: nn.Module | None, *, parameters: bool = True) -> dict[str, list[Any]]:
    """What a module holds, by name: copies of buffers and plain tensors, numbers and texts, and sums of parameters."""
    found: dict[str, list[Any]] = {}
    for path, part in module.named_modules() if module is not None else ():
        own = {name: value for name, value in vars(part).items() if name not in _TORCHS}
        sums = {name: _sum(value) for name, value in part._parameters.items() if parameters}
        for name, value in {**sums, **part._buffers, **own}.items():
            leaves = torch.utils._pytree.tree_leaves(value)
            if all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in leaves):
                found[f"{path}.{name}".lstrip(".")] = [_copy(leaf) for leaf in leaves]
    return found


def registered(module: nn.Module) -> dict[str, list[Any]]:
    """Of what a module holds its parameters and buffers: what else it makes at its first call may be a constant."""
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {name: value for name, value in held(module).items() if name in names}


def random_operators(graph: fx.Graph) -> list[str]:
    """The operators of a graph that draw random numbers, with their lines; dropout in eval mode does not."""
    found = []
    for node in graph.nodes:
        if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) or not node.users:
            continue
        given = {argument.name: argument.default_value for argument in node.target._schema.arguments}
        given |= dict(zip(given, node.args, strict=False)) | node.kwargs
        rates = [given[name] for name in ("p", "dropout_p", "dropout") if isinstance(given.get(name), (int, float))]
        if rates[:1] == [0] or given.get("train", given.get("training", True)) in (False, None):
            continue
        found.append(f"{node.target._schema.name.removeprefix('aten::')}{where(node)}")
    return found


def where(node: fx.Node) -> str:
    """The line of the operator's own code that a node comes from: ` (model.py:12)`."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    own = [frame for frame in frames if not frame[0].startswith((TORCH, _OURS))]
    return f" ({own[-1][0].rpartition('/')[2]}:{own[-1][1]})" if own else ""


def _sum(value: torch.Tensor | None) -> str:
    """One pass and no copy: parameters may be most of the memory."""
    plain = isinstance(value, torch.Tensor) and type(value.data) is torch.Tensor and value.layout is torch.strided
    return str(value.detach().sum(dtype=torch.float64).item()) if plain and value is not None else ""


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _same(before: list[Any] | None, after: list[Any]) -> bool:
    if before is None or len(before) != len(after):
        return False
    return all(
        one.shape == two.shape and one.dtype == two.dtype and torch.equal(one.nan_to_num(), two.nan_to_num())
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
        else type(one) is type(two) and bool(one == two)
        for one, two in zip(before, after, strict=True)
    )


def _copied(outputs: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value.copy() for name, value in outputs.items()}


def _differs(first: Mapping[str, Array], second: Mapping[str, Array], share: float) -> str:
    """The name of an output that is another, beyond `share` of its largest value and its dtype's own precision."""
    for name, value in first.items():
        other = second[name]
        if value.shape != other.shape:
            return name
        if value.dtype.kind in "biu":
            wrong = not np.array_equal(value, other)
        else:
            a, b = value.astype(np.float64), other.astype(np.float64)
            coarse = {2: 30.0, 1: 100.0}.get(value.dtype.itemsize, 1.0)
            largest = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
            wrong = not np.allclose(a, b, rtol=0, atol=coarse * share * max(largest, 1e-12), equal_nan=True)
        if wrong:
            return name
    return ""
