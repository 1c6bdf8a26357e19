"""A program as the engine sees it: a template opened, and what a module says of its parameters and outputs.

`torch.export.load` can run code, so `open_template` demands the digest that the registry recorded, and nothing here may
be given a file from a bucket.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.export.passes
from blake3 import blake3
from torch import nn
from torch.fx.graph import CodeGen

from weighbridge.engines import datatypes, nonfinite
from weighbridge.engines.binding import Parameter
from weighbridge.engines.errors import LoadError, TemplateError


def open_template(path: Path, digest: str, device: str = "cpu") -> nn.Module:
    """Load a template as a module that takes and returns flat positional tensors; its weights are still on `meta`.

    Raises LoadError unless the file's BLAKE3 is `digest`, the one that the registry recorded.
    """
    data = path.read_bytes()
    seen = blake3(data).hexdigest()
    if seen != digest:
        raise LoadError(f"template {path.name}: the file's digest is {seen}, the registry recorded {digest}")
    return read(data, device)


def read(pt2: bytes, device: str = "cpu") -> nn.Module:
    """A template out of trusted bytes. Raises LoadError."""
    with quiet():
        try:
            program = torch.export.load(io.BytesIO(pt2))
            if device != "cpu":
                program = torch.export.passes.move_to_device_pass(program, device)
            module = program.module(check_guards=False)
        except Exception as exc:  # of the zip, of JSON, of torch: whatever a malformed file causes
            said = f"{type(exc).__name__}: {exc}"
            raise LoadError(f"torch {torch.__version__} cannot open the template on {device}: {said}") from exc
    # Inputs are checked against their TensorSpecs; without pytrees and hooks a small call costs a third.
    module.graph.set_codegen(CodeGen())
    module.recompile()
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()
    return module


def describe(value: torch.Tensor, name: str, *, tied: str | None = None) -> Parameter:
    """Shape and dtype of a tensor. Raises TemplateError for a dtype that no protocol has (complex, float8 …)."""
    try:
        dtype = datatypes.to_safetensors(datatypes.from_torch(value.dtype))
    except KeyError as exc:
        raise TemplateError(f"{name}: dtype {value.dtype} is not supported") from exc
    return Parameter(shape=tuple(value.shape), dtype=dtype, tied=tied)


def describe_parameters(module: nn.Module) -> dict[str, Parameter]:
    """Every state-dict entry of a module: shape, dtype, and which entries are one storage. Raises TemplateError."""
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    found = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise TemplateError(f"{name}: extra state that is not a tensor cannot come from a checkpoint")
        root = first.setdefault((value.data_ptr(), tuple(value.shape)), name) if value.numel() else name
        found[name] = describe(value, name, tied=None if root == name else root)
    return found


def describe_program(module: nn.Module) -> dict[str, Parameter]:
    """`describe_parameters` of an operator's own module, whose NaN and infinities are meant. Raises TemplateError."""
    state = module.state_dict()
    return {
        name: its.model_copy(update={"nonfinite": nonfinite.digest(state[name])})
        for name, its in describe_parameters(module).items()
    }


def flat(result: Any) -> list[Any]:
    """The outputs of a module in order: a tensor, a tuple, a list, a dict, or any nesting of them."""
    return torch.utils._pytree.tree_leaves(result)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export warns about its own internals (deprecations, tree specs); nothing that an operator can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
