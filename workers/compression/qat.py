"""int8-qat: fine-tune with int8 weights and activations faked in every linear layer, then quantize as int8-dynamic.

The training rounds what torchao can fake: weights by one scale a row, activations by one scale and zero point a token
(the int8 that runs afterwards has no zero point; torchao fakes no symmetric tokens).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from weighbridge.engines import linears, torchao_format
from weighbridge.engines.encodings import decode
from weighbridge.engines.manifest import ArtifactFile
from weighbridge.registry.recipe import Recovery
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression import recovery, reference, report, torchao_methods
from weighbridge.workers.compression.pruning import require_torch, skipped
from weighbridge.workers.compression.types import Built, NotApplicable, Order

_TRAINED = "trained.safetensors"


def build(order: Order) -> Built:
    """Train by `recover` (or its defaults), then quantize. Raises NotApplicable, BuildFailed."""
    require_torch(order)
    module = reference.open_module(order.original)
    linears.rebuild(module)
    layers = [name for name in linears.linear_layers(module) if not skipped(f"{name}.weight", order.wish)]
    if not layers:
        raise NotApplicable("the program has no linear layer that the recipe does not skip")
    fake_quantize(module, layers)
    frozen = frozenset(name for name in module.state_dict() if skipped(name, order.wish))
    student = recovery.Student(module, frozen=frozen, fake_quantized=tuple(layers))
    wish = order.wish.model_copy(update={"recover": order.wish.recover or Recovery()})
    note = recovery.recover(student, replace(order, wish=wish))
    trained = _trained(order, module.state_dict())
    built = torchao_methods.build(trained)
    rows = _against_the_original(order, built)
    return replace(built, tensors=rows, notes=(note, *built.notes))


def fake_quantize(module: nn.Module, layers: Collection[str]) -> None:
    """Let the named linear layers calculate as if in int8, in place; their names and weights stay. None: nothing."""
    if not layers:
        return
    linears.rebuild(module)
    with torchao_format.quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        config = QATConfig(
            activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"),
            step="prepare",
        )
        quantize_(module, config, filter_fn=lambda part, name: isinstance(part, nn.Linear) and name in layers)


def _trained(order: Order, state: Mapping[str, torch.Tensor]) -> Order:
    """The order for int8-dynamic of the trained weights, which stand in one file under the original's names."""
    original = order.original
    values = decode(original.manifest, original.cache, "cpu")
    binding = original.manifest.binding
    weights = {name: state[binding[name]].detach().cpu().to(value.dtype) for name, value in values.items()}
    folder = order.folder / "int8"
    folder.mkdir()
    path = order.folder / _TRAINED
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    digest = blake3(path.read_bytes()).hexdigest()
    file = ArtifactFile(path=_TRAINED, size=path.stat().st_size, digest=digest)

    def cache(wanted: str) -> Path:
        return path if wanted == digest else original.cache(wanted)

    manifest = original.manifest.model_copy(update={"files": (file,)})
    wish = order.wish.model_copy(update={"method": "int8-dynamic"})
    return replace(order, original=replace(original, manifest=manifest, cache=cache), wish=wish, folder=folder)


def _against_the_original(order: Order, built: Built) -> tuple[VariantTensor, ...]:
    """The rows again, by what became of the original's tensors rather than of the trained ones."""
    values = decode(order.original.manifest, order.original.cache, "cpu")
    (path,) = built.files.values()
    with safe_open(path, "pt") as file:
        weights: dict[str, Any] = torchao_format.unflatten(load_file(path), file.metadata() or {})
    return tuple(_row(row, values[row.name], weights[row.name]) for row in built.tensors)


def _row(row: VariantTensor, original: torch.Tensor, new: Any) -> VariantTensor:
    if torchao_format.is_quantized(new):
        return row.model_copy(update={"sqnr": report.sqnr(original, new.dequantize()), "reason": "fine-tuned in int8"})
    if torch.equal(original, new):
        return row
    return report.changed(row.name, "fine-tuned", original, new, bytes_out=new.nbytes, reason=row.reason)
