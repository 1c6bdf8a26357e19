"""Every tensor that lands is used or accounted for: what validation says of weights and their program."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open

from weighbridge.engines import datatypes
from weighbridge.engines.binding import twins
from weighbridge.engines.nonfinite import digest
from weighbridge.engines.protocols import BlobPath
from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.workers.bindings import Bound
from weighbridge.workers.checkpoint import Contents


def is_meant(one: TensorStats, bound: Bound | None, contents: Contents, cache: BlobPath) -> bool:
    """Whether the operator's own program holds the same NaN and infinities at the same places."""
    wanted = bound.parameters[bound.binding[one.name]].nonfinite if bound is not None else None
    return wanted is not None and digest(_tensor(one.name, contents, cache)) == wanted


def ignored(bound: Bound, contents: Contents, cache: BlobPath) -> str:
    """Why a checkpoint does not fit: of two tensors for one storage the program would ignore one. Empty: it fits."""
    for first, second in twins(bound.binding, bound.parameters):
        one, two = (_tensor(name, contents, cache) for name in (first, second))
        if one.dtype != two.dtype or not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            parameters = f"{bound.binding[first]} and {bound.binding[second]}"
            return (
                f"{bound.program.kind}:{bound.program.name} ties {parameters}, and the checkpoint holds two different "
                f"tensors, {first} and {second}: one would be ignored. Untie them in the program or save them tied"
            )
    return ""


def precision(contents: Contents, bound: Bound) -> dict[str, Any]:
    """In which dtypes the weights are stored, and in which the program computes."""
    stored = {one.dtype for one in contents.stats} & datatypes.FLOATING
    computed = {bound.parameters[name].dtype for name in bound.binding.values()} & datatypes.FLOATING
    said: dict[str, Any] = {"stored": sorted(stored), "computed": sorted(computed)}
    if stored - computed:
        said["note"] = "weights are cast to the program's dtype: the answers are the program's own with these weights"
    return said


def unread(bound: Bound) -> list[str]:
    """The tensors that the program does not read, as its operator said when it was added."""
    return sorted(tensor for tensor, parameter in bound.binding.items() if bound.parameters[parameter].unread)


def _tensor(name: str, contents: Contents, cache: BlobPath) -> torch.Tensor:
    """One tensor out of the files that are kept."""
    for file in contents.weights:
        with safe_open(cache(file.digest), "pt") as opened:
            if name in opened.keys():  # noqa: SIM118  # the file is no mapping
                tensor: torch.Tensor = opened.get_tensor(name)
                return tensor.reshape(-1).contiguous() if tensor.dim() == 0 else tensor.contiguous()
    raise LookupError(name)
