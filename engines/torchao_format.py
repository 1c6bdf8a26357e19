"""torchao's quantized tensors as plain tensors that safetensors holds, and back, bit-exactly.

torchao flattens its tensor subclasses itself; here each goes through it under a name of its own (`<name>.q`: torchao
crashes on names without a dot, and confuses `weight` with `weight_g`), and int4 values, which torchao keeps as one
int8 each, are packed by two into a byte. What a tensor is stands in the file's metadata under one key, because the
order of several is not fixed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from weighbridge.engines.errors import LoadError

KEY = "weighbridge.torchao"
"""The metadata's one key: JSON of {tensor: what torchao says of it}."""
_TAG = "q"
_INT4 = "IntxUnpackedToInt8Tensor"
"""Its `qdata` is one int8 for each weight."""


def minor() -> str:
    """The minor version of the torchao that is installed (`0.18`). Raises LoadError without one."""
    from importlib.metadata import PackageNotFoundError

    try:
        return ".".join(version("torchao").split(".")[:2])
    except PackageNotFoundError as exc:
        raise LoadError("the artifact is quantized by torchao, which this machine has not: install torchao") from exc


def require(made_by: str) -> None:
    """Raise LoadError unless the installed torchao is of the minor version that made an artifact.

    Its formats are a prototype: another minor version may read the same bytes as other numbers.
    """
    if (here := minor()) != made_by:
        raise LoadError(f"the artifact was made by torchao {made_by}; this machine has {here}: build the variant again")


def flatten(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(plain tensors, the file's metadata) of weights among which some are torchao's."""
    with quiet():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    plain: dict[str, torch.Tensor] = {}
    said: dict[str, Any] = {}
    for name, value in weights.items():
        if not is_quantized(value):
            plain[name] = value.detach().contiguous()
            continue
        parts, metadata = flatten_tensor_state_dict({f"{name}.{_TAG}": _bare(value)})
        said[name] = json.loads(metadata[f"{name}.{_TAG}"])
        if _is_int4(said[name]):
            key = f"{name}._{_TAG}_qdata"
            said[name]["columns"] = parts[key].shape[-1]
            parts[key] = _pack(parts[key])
        plain |= {key: part.contiguous() for key, part in parts.items()}
    return plain, {KEY: json.dumps(said, sort_keys=True)}


def unflatten(parts: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The weights by name. Raises LoadError when the parts and the metadata do not fit."""
    with quiet():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    if KEY not in metadata:
        raise LoadError(f"the file's metadata has no {KEY}: it was not written by this program")
    said: dict[str, dict[str, Any]] = json.loads(metadata[KEY])
    rest = dict(parts)
    weights: dict[str, torch.Tensor] = {}
    for name, its in said.items():
        prefix = f"{name}._{_TAG}_"
        own = {key: rest.pop(key) for key in list(rest) if key.startswith(prefix)}
        columns = its.pop("columns", None)
        if columns is not None and f"{prefix}qdata" in own:
            own[f"{prefix}qdata"] = _unpack(own[f"{prefix}qdata"], columns)
        tensor = f"{name}.{_TAG}"
        described = {tensor: json.dumps(its), "tensor_names": json.dumps([tensor])}
        try:
            made, left = unflatten_tensor_state_dict(own, described)
            weights[name] = made[tensor]
        except (KeyError, ValueError, TypeError, AssertionError, AttributeError) as exc:
            raise LoadError(f"{name}: torchao cannot put it together again: {type(exc).__name__}: {exc}") from exc
        if left:
            raise LoadError(f"{name}: {min(left)} belongs to no part of it")
    return weights | rest


def is_quantized(value: torch.Tensor) -> bool:
    """Whether it is a tensor subclass of torchao."""
    return type(_bare(value)) is not torch.Tensor


def nbytes(value: torch.Tensor) -> int:
    """Bytes that the tensor takes in the file."""
    parts, _ = flatten({"x": value})
    return sum(part.nbytes for part in parts.values())


@contextmanager
def quiet() -> Iterator[None]:
    """torchao warns at import about its own kernels and enums; nothing that an operator can act on."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.utils._pytree", "torchao", "torch.export")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _bare(value: torch.Tensor) -> torch.Tensor:
    """Without `nn.Parameter` around a plain tensor; torchao's subclasses stay what they are."""
    return value.detach()


def _is_int4(said: Mapping[str, Any]) -> bool:
    return bool(said["_type"] == _INT4 and said["_data"]["target_dtype"]["_data"] == "int4")


def _pack(values: torch.Tensor) -> torch.Tensor:
    """int8 in [-8, 7], [..., columns] → uint8 [..., ⌈columns / 2⌉]; the even column is the low half."""
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    halves = values.view(torch.uint8) & 0xF
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def _unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `_pack`: shifted up and back down, the sign fills the upper half."""
    low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)[..., :columns].contiguous()
