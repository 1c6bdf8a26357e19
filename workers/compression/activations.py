"""Which weights are a linear or convolution layer's, and how large its inputs are: one watched run of some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from weighbridge.engines import datatypes
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Arrays

_aten = torch.ops.aten
_LINEAR = {nn.functional.linear, _aten.linear.default}
_CONV = {
    *(nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d),
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default),
    *(_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
}
_EMBEDDING = {torch.embedding, _aten.embedding.default}


@dataclass
class Layer:
    """A layer's use of its weight. `squares`: per input channel the sum of the squares of what came in, (channels,)."""

    kind: Literal["linear", "conv"]
    squares: torch.Tensor
    groups: int = 1

    @property
    def norms(self) -> torch.Tensor:
        """L2 norm of each input channel over all rows (and tokens, and pixels), (channels,)."""
        return self.squares.sqrt().float()


@dataclass(frozen=True)
class Seen:
    """What a run showed, by the names of the module's state dict: tied names stand there both."""

    layers: dict[str, Layer] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)


def watch(module: nn.Module, inputs: Sequence[TensorSpec], batches: Iterable[Arrays], device: str = "cpu") -> Seen:
    """Run the batches and look at every linear, convolution and embedding that the program calls.

    Works on modules and on exported graphs alike. A fused kernel that takes the weights itself hides them.
    """
    seen = Seen()
    mode = _Watch(names_by_storage(module), seen)
    with torch.inference_mode():
        for arrays in batches:
            tensors = positional(inputs, arrays, device)
            with mode:
                module(*tensors)
    return seen


def positional(inputs: Sequence[TensorSpec], arrays: Arrays, device: str) -> list[torch.Tensor]:
    """The arrays as the program takes them: in order, on its device."""
    return [datatypes.array_to_tensor(np.ascontiguousarray(arrays[spec.name])).to(device) for spec in inputs]


def names_by_storage(module: nn.Module) -> dict[tuple[int, torch.Size], list[str]]:
    """The state dict's names by the tensor that they hold: tied ones stand together."""
    names: dict[tuple[int, torch.Size], list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        names.setdefault(_key(value), []).append(name)
    return names


def _key(value: torch.Tensor) -> tuple[int, torch.Size]:
    return value.data_ptr(), value.shape


class _Watch(TorchFunctionMode):
    def __init__(self, names: dict[tuple[int, torch.Size], list[str]], seen: Seen) -> None:
        super().__init__()
        self._names, self._seen = names, seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LINEAR:
            self._linear(*args[:2])
        elif func in _CONV:
            self._conv(args[0], args[1], args[6] if len(args) > 6 else (kwargs or {}).get("groups", 1))
        elif func in _EMBEDDING:
            self._seen.embeddings.update(self._names.get(_key(args[0]), ()))
        return func(*args, **(kwargs or {}))

    def _linear(self, value: torch.Tensor, weight: torch.Tensor) -> None:
        self._add(weight, "linear", value.reshape(-1, value.shape[-1]).float().norm(dim=0), 1)

    def _conv(self, value: torch.Tensor, weight: torch.Tensor, groups: int) -> None:
        batched = value if value.ndim == weight.ndim else value[None]
        others = [axis for axis in range(batched.ndim) if axis != 1]
        self._add(weight, "conv", torch.linalg.vector_norm(batched.float(), dim=others), groups)

    def _add(self, weight: torch.Tensor, kind: Literal["linear", "conv"], norms: torch.Tensor, groups: int) -> None:
        squares = norms.double().square()
        for name in self._names.get(_key(weight), ()):
            layer = self._seen.layers.setdefault(name, Layer(kind, torch.zeros_like(squares), groups))
            layer.squares += squares
