"""Tensors in memory as a safetensors file, or why they cannot be one. numpy and torch come only with such tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weighbridge.storage.errors import MissingDependency, NotPublishable

Tensors = Mapping[str, Any]
"""Arrays by tensor name: numpy arrays, torch tensors, or whatever numpy can make an array of."""

_NUMBERS = "biufc"
"""The kinds of numpy's dtypes that are numbers: bool, int, unsigned, float, complex."""


def save(tensors: Tensors, path: Path) -> None:
    """Write tensors to a file. Raises NotPublishable, naming the tensor and the rule; MissingDependency."""
    check_names(tensors)
    try:
        if any(hasattr(tensor, "detach") for tensor in tensors.values()):
            _save_torch(tensors, path)
        else:
            _save_numpy(tensors, path)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "publishing tensors needs safetensors: pip install 'weighbridge[engine]', or publish a file"
        ) from error


def check_names(tensors: Mapping[Any, Any]) -> None:
    """Raise NotPublishable unless there are tensors, each under a name of its own that is text."""
    if not tensors:
        raise NotPublishable("there are no tensors to publish")
    for name in tensors:
        if not isinstance(name, str):
            raise NotPublishable(f"the name {name!r} is {type(name).__name__}: tensors have names of text")
        if not name or not name.isprintable() or name == "__metadata__":
            raise NotPublishable(f"no tensor can be named {name!r}: its name has printable characters, at least one")


def _save_numpy(tensors: Tensors, path: Path) -> None:
    import safetensors.numpy

    safetensors.numpy.save_file({name: _array(name, value) for name, value in tensors.items()}, path)


def _array(name: str, value: Any) -> Any:
    import numpy as np

    try:
        array = np.asarray(value, order="C")
    except (ValueError, TypeError) as error:
        raise NotPublishable(f"{name!r} is {type(value).__name__}, not a tensor: {error}") from error
    if array.dtype.kind not in _NUMBERS:
        hint = ": publish its parts one by one, such as checkpoint['model']" if isinstance(value, Mapping) else ""
        raise NotPublishable(f"{name!r} is {type(value).__name__} ({array.dtype}), not a tensor of numbers{hint}")
    return array


def _save_torch(tensors: Tensors, path: Path) -> None:
    import safetensors.torch
    import torch

    plain, seen = {}, set[int]()
    for name, value in tensors.items():
        tensor = _plain(name, value if isinstance(value, torch.Tensor) else torch.as_tensor(_array(name, value)))
        # Each with memory of its own: tied weights and views of one tensor are written once for each name.
        pointer = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    try:
        safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
    except (ValueError, KeyError, RuntimeError) as error:
        raise NotPublishable(f"these tensors cannot be written as safetensors: {error}") from error


def _plain(name: str, tensor: Any) -> Any:
    """The tensor's numbers on the CPU, in a row. Raises NotPublishable where it has none, or other than plain ones."""
    import torch

    if tensor.is_meta:
        raise NotPublishable(f"{name!r} is on the meta device: it has a shape and no numbers")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise NotPublishable(f"{name!r} is sparse or quantized: publish it dense (`.to_dense()`, `.dequantize()`)")
    try:
        return tensor.detach().cpu().contiguous()
    except RuntimeError as error:
        raise NotPublishable(f"{name!r} cannot be brought to the CPU: {error}") from error
