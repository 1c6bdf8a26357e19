"""The torch engine: template and factory programs, safetensors weights mapped from disk, numpy in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from weighbridge.engines import calling, datatypes, linears, tensors
from weighbridge.engines.binding import Parameter, bind
from weighbridge.engines.encodings import HALF, REBUILT, check_encoding, decode, sparsify
from weighbridge.engines.errors import EngineError, LoadError
from weighbridge.engines.factory import make
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.program import describe, describe_parameters, flat, open_template
from weighbridge.engines.protocols import Arrays, BlobPath


class TorchEngine:
    """Loads artifacts whose program is a template or a factory that `factories` (shell patterns) allows.

    `threads` sets torch's intra-op threads for the whole process; None leaves them.
    """

    def __init__(self, factories: Sequence[str] = (), *, threads: int | None = None) -> None:
        self._factories = tuple(factories)
        if threads is not None:
            torch.set_num_threads(threads)

    def load(self, manifest: Manifest, blobs: BlobPath, *, device: str = "cpu") -> TorchSession:
        """Load, bind and prepare. Raises LoadError.

        The dtype in which weights are stored says nothing of the one to compute in: a program computes in its own, with
        its own constants, and weights of another floating dtype are cast to it here. A variant that was made for it
        multiplies in its weights' 16 bits (the encoding says so).
        """
        check_encoding(manifest, device)
        module = self._program(manifest, blobs, device)
        if manifest.encoding is not None and manifest.encoding.kind in REBUILT:
            linears.rebuild(module)
        parameters = describe_parameters(module)
        own = {name: datatypes.to_torch(datatypes.from_safetensors(its.dtype)) for name, its in parameters.items()}
        weights = _bound(manifest, decode(manifest, blobs, device), parameters)
        halves = manifest.encoding is not None and manifest.encoding.kind in HALF
        stay = linears.halve(module, weights) if halves else frozenset()
        cast = {
            name: value if value.dtype is own[name] or name in stay else value.to(own[name])
            for name, value in weights.items()
        }
        try:
            module.load_state_dict(cast, assign=True, strict=True)
        except RuntimeError as exc:
            raise LoadError(f"{manifest.program.name}: {exc}") from exc
        if manifest.encoding is not None and manifest.encoding.kind == "semi_structured":
            sparsify(module, device)
        return TorchSession(module.requires_grad_(False), manifest, device)

    def _program(self, manifest: Manifest, blobs: BlobPath, device: str) -> nn.Module:
        program = manifest.program
        if program.kind == "factory":
            # Real values on CPU first: a non-persistent buffer made on `meta` would answer wrong, silently.
            module = make(program.name, self._factories).eval().to(device)
            calling.adapt(module, manifest.inputs, [spec.name for spec in manifest.outputs])
            return module
        if program.digest is None:
            raise LoadError(f"template {program.name}: the manifest names no digest")
        return open_template(blobs(program.digest), program.digest, device)


class TorchSession:
    """A bound module on one device. Not thread-safe: one caller at a time."""

    def __init__(self, module: nn.Module, manifest: Manifest, device: str) -> None:
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        self._device = torch.device(device)
        self._module: nn.Module | None = module
        self._wanted = [datatypes.to_torch(spec.datatype) for spec in self.outputs]

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch. Raises InvalidInput; EngineError when the program itself fails or breaks its outputs."""
        tensors.check_inputs(inputs, self.inputs)
        if self._module is None:
            raise EngineError("the session is closed")
        with torch.inference_mode():
            try:
                given = (datatypes.array_to_tensor(inputs[spec.name]).to(self._device) for spec in self.inputs)
                results = flat(self._module(*given))
            except (RuntimeError, IndexError, ValueError, TypeError) as exc:
                raise EngineError(f"the program failed: {exc}") from exc
            if len(results) != len(self.outputs):
                raise EngineError(f"the program gave {len(results)} outputs, the artifact names {len(self.outputs)}")
            return {
                spec.name: datatypes.tensor_to_array(result.to(wanted))
                for spec, result, wanted in zip(self.outputs, results, self._wanted, strict=True)
            }

    @property
    def module(self) -> nn.Module:
        """The bound module itself, for what makes a variant of it. Raises EngineError when closed."""
        if self._module is None:
            raise EngineError("the session is closed")
        return self._module

    def close(self) -> None:
        """Let the weights go."""
        self._module = None


def _bound(
    manifest: Manifest, found: dict[str, torch.Tensor], parameters: dict[str, Parameter]
) -> dict[str, torch.Tensor]:
    """The weights by parameter name; what is tied and absent is the same tensor again."""
    seen = {name: describe(value, name) for name, value in found.items()}
    if bind(seen, parameters, cast=True) != manifest.binding:
        raise LoadError(f"{manifest.program.name}: the manifest's binding is not the one of these files")
    weights = {parameter: found[tensor] for tensor, parameter in manifest.binding.items()}
    for name, parameter in parameters.items():
        if name in manifest.ties:
            weights[name] = weights[manifest.ties[name]]
        elif name not in weights:  # a manifest from before ties were written; a factory's are still to be seen
            root = parameter.tied or name
            group = [root, *(other for other, its in parameters.items() if its.tied == root)]
            weights[name] = next(weights[other] for other in group if other in weights)
    return weights
