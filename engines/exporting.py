"""From an operator's module to an exported program: what cannot be exported is refused, with the operator's line."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from weighbridge.engines import calling, datatypes, purity
from weighbridge.engines.errors import ImpureProgram, TemplateError
from weighbridge.engines.lengths import Assumed, assumed
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.protocols import Arrays
from weighbridge.engines.trials import positional


def export(module: nn.Module, specs: Sequence[TensorSpec], example: Arrays) -> tuple[ExportedProgram, Assumed]:
    batch = Dim("batch", min=1)
    dynamic = {
        name: {axis: batch if axis == 0 else Dim.AUTO for axis, length in enumerate(spec.shape) if length == -1}
        for name, spec in zip(calling.identifiers(specs), specs, strict=True)
    }
    try:
        program = torch.export.export(module, positional(specs, example), dynamic_shapes=dynamic)
    except Exception as exc:  # whatever the operator's own forward raises, besides the exporter's many kinds
        raise TemplateError(f"{type(module).__name__} cannot be exported: {_reason(exc)}") from exc
    if random := purity.random_operators(program.graph):
        raise ImpureProgram(f"forward() is random: {random[0]}; the same input must have one answer")
    return program, assumed(program, specs, {name: array.shape for name, array in example.items()})


def refuse_datatypes(inputs: Sequence[TensorSpec]) -> None:
    for spec in inputs:
        if spec.datatype == datatypes.BYTES or spec.datatype not in datatypes.NAMES:
            known = ", ".join(name for name in datatypes.NAMES if name != datatypes.BYTES)
            raise TemplateError(f"input {spec.name}: a program takes no {spec.datatype} ({known})")


def refuse_meta(module: nn.Module) -> None:
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


def refuse_strange(program: ExportedProgram) -> None:
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise TemplateError(f"constant {name} is on {value.device}: build the module on CPU, with real values")
    for node in program.graph.nodes:
        device = node.kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            raise TemplateError(f"{node.name} makes a tensor on {device}: use the input's device")


def strip_and_save(program: ExportedProgram) -> bytes:
    state = program.state_dict
    for name, value in state.items():
        empty = torch.empty_like(value, device="meta")
        state[name] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
    program._example_inputs = None  # rows of somebody's data, and a pickle in the file
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _reason(exc: Exception) -> str:
    """What the exporter said, without its advice, and the operator's line where it names one."""
    text = str(exc)
    line = re.search(r'File "([^"]+)", line (\d+), in \w+\n\s+(.+)', text)
    text = text.split("Suggested fixes")[0].split("Caused by:")[0].split("consider using data-dependent")[0]
    text = text.split("The error above occurred when")[0].replace(
        'For more information, run with TORCH_LOGS="+dynamic".', ""
    )
    said = " ".join(part.strip(" -") for part in text.splitlines() if part.strip())
    data = "forward() decides on the values of its inputs, which an export cannot: " if "data-dependent" in text else ""
    at = f" ({line[1].rpartition('/')[2]}:{line[2]}: {line[3].strip()})" if line else ""
    return f"{data}{said}{at}"
