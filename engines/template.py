"""Make a template from trusted operator code: a `.pt2` with the graph and its constants, without the weights.

It is proven while it is made: that it binds, that it answers as the module does on other inputs, and that it is a pure
function. What it takes for granted becomes its contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import nn

from weighbridge.engines import calling, exporting
from weighbridge.engines.binding import Parameter, fingerprint
from weighbridge.engines.building import Building
from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.program import describe, describe_parameters, describe_program, flat, open_template, quiet
from weighbridge.engines.protocols import Arrays

__all__ = [
    "Template",
    "build",
    "describe",
    "describe_parameters",
    "describe_program",
    "find_contract",
    "flat",
    "open_template",
]


@dataclass(frozen=True)
class Template:
    """A finished template: `pt2` is the file, `digest` its BLAKE3; the rest is what a registry records of it.

    `inputs` are in the order in which the program takes them, with the lengths and values that it takes. `notes` say
    what somebody who reads the contract would miss: where it is narrower than forward() itself.
    """

    pt2: bytes
    digest: str
    fingerprint: str
    parameters: dict[str, Parameter]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: tuple[str, ...] = ()


def build(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    output_names: Sequence[str] = (),
    example: Arrays | None = None,
    *,
    positional: bool = False,
    unread: Sequence[str] = (),
) -> Template:
    """Export `module` on CPU, strip its weights, prove that it binds and that it is a pure function; find its contract.

    Inputs and outputs bind by name (`engines.calling`), by their order where `positional`. A -1 in axis 0 is the batch,
    elsewhere a free length. `example`: inputs of two or more rows, for programs that random ones do not suit. `unread`:
    patterns of the parameters that the program may leave unread. Raises TemplateError.
    """
    module = module.eval()
    exporting.refuse_meta(module)
    exporting.refuse_datatypes(inputs)
    parameters = describe_program(module)
    kept = _state(module)
    specs = calling.adapt(module, inputs, output_names, positional=positional)
    try:
        with quiet():
            building = Building(module, parameters, tuple(output_names), tuple(unread))
            pt2, contract, outputs = building.run(specs, example)
    finally:
        calling.restore(module)
        _put_back(module, kept)
    known, digest = building.parameters, blake3(pt2).hexdigest()
    return Template(pt2, digest, fingerprint(known), known, contract, outputs, tuple(building.notes))


def find_contract(
    module: nn.Module, inputs: Sequence[TensorSpec], output_names: Sequence[str]
) -> tuple[tuple[TensorSpec, ...], tuple[str, ...]]:
    """The contract of a module that is served as it is (a factory's), and notes of what could not be found.

    Raises TemplateError where names do not fit, or where it is no pure function.
    """
    module = module.eval()
    kept = _state(module)
    specs = calling.adapt(module, inputs, output_names)
    try:
        with quiet():
            return Building(module, describe_parameters(module), tuple(output_names), ()).contract(specs)
    finally:
        calling.restore(module)
        _put_back(module, kept)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, also those that no checkpoint holds."""
    return {name: value.detach().clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


def _put_back(module: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name in kept and kept[name].shape == value.shape:
                value.copy_(kept[name])
