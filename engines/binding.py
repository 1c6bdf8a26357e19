"""Which tensor of a checkpoint is which parameter of a program: by name, shape and dtype. Imports without torch.

DistributedDataParallel and torch.compile put `module.` and `_orig_mod.` into names, around the whole model or around a
part of it; both sides are compared without these parts. Bytes are never rewritten: a binding maps names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

from weighbridge.engines import datatypes
from weighbridge.engines.errors import BindingError

WRAPPERS = frozenset({"module", "_orig_mod"})
_NAMED = 8
"""How many names of each kind a message shows."""


class Shaped(Protocol):
    """What is compared of a checkpoint's tensor. `dtype` is the safetensors name."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


class Parameter(BaseModel):
    """A parameter (or persistent buffer) of a program.

    `dtype` is the safetensors name. `tied` names the parameter whose storage this one shares: a checkpoint may leave
    it out. `nonfinite` is the digest of what is not finite in the operator's own program (a causal mask of -inf).
    `unread`: the program never reads it, and its operator said so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    dtype: str
    tied: str | None = None
    nonfinite: str | None = None
    unread: bool = False


Tensors = Mapping[str, Shaped]
Parameters = Mapping[str, Parameter]


def normal_name(name: str) -> str:
    """The name without the parts that wrappers add: `module._orig_mod.fc.weight` → `fc.weight`."""
    parts = name.split(".")
    return ".".join([part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:])


def fingerprint(tensors: Tensors) -> str:
    """BLAKE3 (hex) of the sorted normal names with shapes and dtypes. Raises BindingError when two names collide."""
    rows = sorted((name, list(tensors[own].shape), tensors[own].dtype) for name, own in _by_normal(tensors).items())
    return blake3(json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def bind(tensors: Tensors, parameters: Parameters, *, cast: bool = False) -> dict[str, str]:
    """Map every tensor to its parameter, one to one; tied parameters may be absent from the tensors.

    With `cast`, floating dtypes may differ (bf16 weights of a float32 program). Raises BindingError.
    """
    ours, theirs = _by_normal(tensors), _by_normal(parameters)
    bound = {ours[name]: theirs[name] for name in ours.keys() & theirs.keys()}
    present = set(bound.values())
    missing = sorted(name for name in parameters if name not in present and not _group(name, parameters) & present)
    unexpected = sorted(ours[name] for name in ours.keys() - theirs.keys())
    mismatched = sorted(
        tensor for tensor, parameter in bound.items() if not _fits(tensors[tensor], parameters[parameter], cast)
    )
    if not (missing or unexpected or mismatched):
        return dict(sorted(bound.items()))
    details = [f"{name} is {_shown(tensors[name])}, not {_shown(parameters[bound[name]])}" for name in mismatched]
    message = "; ".join(
        f"{what} {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("differs:", details))
        if names
    )
    raise BindingError(message, missing=missing, unexpected=unexpected, mismatched=mismatched)


def ties(binding: Mapping[str, str], parameters: Parameters) -> dict[str, str]:
    """{parameter without a tensor → the one that shares its storage and has one}."""
    bound = set(binding.values())
    return {
        name: min(_group(name, parameters) & bound)
        for name in parameters
        if name not in bound and _group(name, parameters) & bound
    }


def twins(binding: Mapping[str, str], parameters: Parameters) -> list[tuple[str, str]]:
    """Pairs of tensors that are bound to one storage: the program reads one of them, so that they must be equal."""
    first: dict[str, str] = {}
    pairs = []
    for tensor, parameter in sorted(binding.items()):
        root = parameters[parameter].tied or parameter
        if (twin := first.setdefault(root, tensor)) != tensor:
            pairs.append((twin, tensor))
    return pairs


def matches(tensors: Tensors, parameters: Parameters) -> bool:
    """Whether the fingerprints are equal (parameters that are tied count as present)."""
    try:
        bind(tensors, parameters)
    except BindingError:
        return False
    return True


def _shown(one: Shaped) -> str:
    return f"{one.dtype}{list(one.shape)}"


def _fits(tensor: Shaped, parameter: Parameter, cast: bool) -> bool:
    castable = cast and {tensor.dtype, parameter.dtype} <= datatypes.FLOATING
    return tensor.shape == parameter.shape and (castable or tensor.dtype == parameter.dtype)


def _group(name: str, parameters: Parameters) -> set[str]:
    """Every parameter that shares storage with this one; empty for a parameter of its own."""
    root = parameters[name].tied or name
    group = {other for other, parameter in parameters.items() if parameter.tied == root}
    return group | {root} if group else set()


def _by_normal(tensors: Tensors) -> dict[str, str]:
    """{normal name: own name}."""
    names: dict[str, str] = {}
    for own in sorted(tensors):
        other = names.setdefault(normal_name(own), own)
        if other != own:
            pair = sorted((other, own))
            raise BindingError(
                f"{pair[0]} and {pair[1]} are one name without wrapper prefixes",
                missing=[],
                unexpected=pair,
                mismatched=[],
            )
    return names


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
