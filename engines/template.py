"""Make a template from trusted operator code: a `.pt2` with the graph and its constants, without the weights.

`torch.export.load` can run code, so `open_template` demands the digest that the registry recorded, and nothing here may
be given a file from a bucket.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.export.passes
from blake3 import blake3
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen

from weighbridge.engines import datatypes, tensors
from weighbridge.engines.binding import Parameter, fingerprint
from weighbridge.engines.errors import LoadError, TemplateError
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Array, Arrays

_EXAMPLE_ROWS = 3
"""Not 0 or 1, which torch.export takes for constants."""


@dataclass(frozen=True)
class Template:
    """A finished template: `pt2` is the file, `digest` its BLAKE3; the rest is what a registry records of it."""

    pt2: bytes
    digest: str
    fingerprint: str
    parameters: dict[str, Parameter]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def build(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    output_names: Sequence[str] = ("output",),
    example: Arrays | None = None,
) -> Template:
    """Export `module` (on CPU, called with the inputs in their order), strip its weights, prove that it binds.

    A -1 in axis 0 is the batch, elsewhere a free length. `example`: inputs of two or more rows, for programs
    that random ones do not suit. Raises TemplateError.
    """
    module = module.eval()
    _refuse_meta(module)
    parameters = describe_parameters(module)
    given = dict(example) if example is not None else tensors.synthetic(inputs, size=_EXAMPLE_ROWS, seed=0)
    tensors.check_inputs(given, inputs)
    with _quiet():
        program = _export(module, inputs, given)
        _refuse_strange(program)
        pt2 = _strip_and_save(program)
    outputs = _compare(module, pt2, parameters, inputs, tuple(output_names), given)
    return Template(pt2, blake3(pt2).hexdigest(), fingerprint(parameters), parameters, tuple(inputs), tuple(outputs))


def open_template(path: Path, digest: str, device: str = "cpu") -> nn.Module:
    """Load a template as a module that takes and returns flat positional tensors; its weights are still on `meta`.

    Raises LoadError unless the file's BLAKE3 is `digest`, the one that the registry recorded.
    """
    data = path.read_bytes()
    seen = blake3(data).hexdigest()
    if seen != digest:
        raise LoadError(f"template {path.name}: the file's digest is {seen}, the registry recorded {digest}")
    return _load(data, device)


def _load(pt2: bytes, device: str) -> nn.Module:
    with _quiet():
        try:
            program = torch.export.load(io.BytesIO(pt2))
            if device != "cpu":
                program = torch.export.passes.move_to_device_pass(program, device)
            module = program.module(check_guards=False)
        except RuntimeError as exc:
            raise LoadError(f"torch {torch.__version__} cannot open the template on {device}: {exc}") from exc
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


def _refuse_meta(module: nn.Module) -> None:
    """A constant without values loads every key and answers wrong, silently."""
    state = [*module.named_parameters(), *module.named_buffers()]
    constants = [
        (f"{path}.{name}".lstrip("."), value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, torch.Tensor)
    ]
    for name, value in state + constants:
        if value.device.type != "cpu":
            raise TemplateError(f"{name} is on {value.device}: build the module on CPU, with real values")


def _export(module: nn.Module, inputs: Sequence[TensorSpec], example: Arrays) -> ExportedProgram:
    batch = Dim("batch", min=1)
    dynamic = tuple(
        {axis: batch if axis == 0 else Dim.AUTO for axis, length in enumerate(spec.shape) if length == -1}
        for spec in inputs
    )
    try:
        return torch.export.export(module, _positional(inputs, example), dynamic_shapes=dynamic)
    except Exception as exc:  # whatever the operator's own forward raises, besides the exporter's many kinds
        raise TemplateError(f"{type(module).__name__} cannot be exported: {exc}") from exc


def _refuse_strange(program: ExportedProgram) -> None:
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise TemplateError(f"constant {name} is on {value.device}: build the module on CPU, with real values")
    for node in program.graph.nodes:
        device = node.kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            raise TemplateError(f"{node.name} makes a tensor on {device}: use the input's device")


def _strip_and_save(program: ExportedProgram) -> bytes:
    state = program.state_dict
    for name, value in state.items():
        empty = torch.empty_like(value, device="meta")
        state[name] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
    program._example_inputs = None  # rows of somebody's data, and a pickle in the file
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _compare(
    module: nn.Module,
    pt2: bytes,
    parameters: Mapping[str, Parameter],
    inputs: Sequence[TensorSpec],
    names: tuple[str, ...],
    example: Arrays,
) -> list[TensorSpec]:
    """Run other weights through the stripped file and through eager, at other sizes and lengths; derive the outputs."""
    original = {name: value.clone() for name, value in module.state_dict().items()}
    weights = {name: _perturb(value) for name, value in original.items()}
    for name, parameter in parameters.items():
        weights[name] = weights[parameter.tied or name]
    loaded = _load(pt2, "cpu")
    loaded.load_state_dict(weights, assign=True, strict=True)
    sizes = (1, 2) if any(-1 in spec.shape[:1] for spec in inputs) else (_EXAMPLE_ROWS,)
    tries = [(f"batch size {size}", tensors.rows(example, 0, size, inputs)) for size in sizes]
    if any(-1 in spec.shape[1:] for spec in inputs):
        tries += (
            [("other lengths", shorter)] if _accepts(module, inputs, shorter := _shortened(example, inputs)) else []
        )
    shapes: list[list[tuple[int, ...]]] = []
    try:
        module.load_state_dict(weights, strict=True)
        with torch.inference_mode():
            for what, arrays in tries:
                part = _positional(inputs, arrays)
                expected, seen = flat(module(*part)), _run(loaded, part)
                _must_equal(expected, seen, names, what)
                shapes.append([tuple(value.shape) for value in expected])
    finally:
        module.load_state_dict(original, strict=True)
    return [
        TensorSpec(name=name, datatype=datatypes.from_torch(value.dtype), shape=_free([shape[i] for shape in shapes]))
        for i, (name, value) in enumerate(zip(names, expected, strict=True))
    ]


def _run(loaded: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    try:
        return flat(loaded(*inputs))
    except RuntimeError as exc:
        raise TemplateError(f"the exported program fails where the module does not: {exc}") from exc


def _must_equal(expected: list[Any], seen: list[Any], names: tuple[str, ...], what: str) -> None:
    if len(expected) != len(names) or not all(isinstance(value, torch.Tensor) for value in expected):
        raise TemplateError(
            f"the module returns {len(expected)} values, named are {', '.join(names)}: name each tensor"
        )
    for name, want, got in zip(names, expected, seen, strict=True):
        if want.shape != got.shape or not torch.allclose(want, got, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise TemplateError(f"output {name} of the stripped program differs from the module's at {what}")


def flat(result: Any) -> list[Any]:
    """The outputs of a module in order: a tensor, a tuple, a list, a dict, or any nesting of them."""
    return torch.utils._pytree.tree_leaves(result)


def _perturb(value: torch.Tensor) -> torch.Tensor:
    """Other weights of the same scale; what is positive (a running variance) stays so."""
    if not value.is_floating_point():
        return value.clone()
    return value * (0.9 + 0.2 * torch.rand_like(value)) + 0.02 * torch.rand_like(value)


def _positional(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> tuple[torch.Tensor, ...]:
    return tuple(datatypes.array_to_tensor(np.ascontiguousarray(arrays[spec.name])) for spec in specs)


def _shortened(example: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The example with every free length but the batch's one shorter, where it can be: lengths that agree still do."""
    cut = {}
    for spec in inputs:
        shape = zip(example[spec.name].shape, spec.shape, strict=True)
        lengths = [max(1, length - 1) if axis and free == -1 else length for axis, (length, free) in enumerate(shape)]
        cut[spec.name] = example[spec.name][tuple(slice(length) for length in lengths)]
    return cut


def _accepts(module: nn.Module, inputs: Sequence[TensorSpec], arrays: Arrays) -> bool:
    """Whether the module itself runs on these: its lengths may have rules of their own (even ones, multiples of 8)."""
    try:
        with torch.inference_mode():
            module(*_positional(inputs, arrays))
    except Exception:  # whatever the operator's own forward raises
        return False
    return True


def _free(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Where they agree, else -1."""
    return tuple(lengths[0] if len(set(lengths)) == 1 else -1 for lengths in zip(*shapes, strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals (deprecations, tree specs); nothing that an operator can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
