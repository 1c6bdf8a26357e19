"""Quantized linear layers through torchao: int8 and fp8 with float or quantized activations, int4 by groups.

torchao looks for `nn.Linear` and skips all else without a word: here the exported program's are rebuilt first, every
layer is quantized by itself, looked at afterwards, and what stays is named with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from weighbridge.engines import datatypes, linears, torchao_format
from weighbridge.engines.encodings import decode
from weighbridge.engines.manifest import Encoding
from weighbridge.engines.torch_engine import TorchEngine, TorchSession
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression import report
from weighbridge.workers.compression.casting import ENGINE
from weighbridge.workers.compression.types import BuildFailed, Built, NotApplicable, Order, Original
from weighbridge.workers.ours import out_of_memory

_FP8_CAPABILITY = (8, 9)
_TILES_CAPABILITY, _TILE_GROUPS = (8, 0), (32, 64, 128, 256)
"""What CUDA's int4 kernel, which is part of torch, takes; bf16 only."""
_ACTION = {"int8": "int8, a scale a row", "int4": "int4, a scale a group", "fp8": "fp8, a scale a row"}
_TIED = "tied to {}: quantizing it would untie them"
_COMPUTED = {"int8-dynamic": "I8", "fp8-dynamic": "F8_E4M3"}
"""Methods that quantize the activations too, and what they multiply in."""


@dataclass(frozen=True)
class _Scheme:
    """torchao's config, what it takes of a layer, and what it promises."""

    config: Any
    group: int | None
    """Columns that share a scale; None: a whole row."""
    bits: int
    overhead: int
    """Bytes of a scale and a zero point."""
    cuda: bool = False
    """The result loads on CUDA only."""

    def promised(self, weight: torch.Tensor) -> float:
        rows, columns = weight.shape
        return weight.numel() * self.bits / 8 + rows * (columns / (self.group or columns)) * self.overhead


def build(order: Order) -> Built:
    """Quantize every linear layer that the wish does not skip. Raises NotApplicable, BuildFailed."""
    original, method = order.original, order.wish.method
    _require_device(method, original.device)
    if original.manifest.engine.get("name", "torch") != "torch":
        raise NotApplicable(f"{method}: the original is no torch program; use the onnx methods")
    session = TorchEngine(original.factories).load(original.manifest, original.cache, device=original.device)
    try:
        return _quantize(order, session)
    finally:
        session.close()


def _quantize(order: Order, session: TorchSession) -> Built:
    module, binding = session.module, order.original.manifest.binding
    linears.rebuild(module)
    layers = linears.linear_layers(module)
    if not layers:
        raise NotApplicable(f"{order.wish.method}: the program has no linear layer; only those are quantized")
    computed = next(iter(layers.values())).weight.dtype
    scheme = _scheme(order, computed)
    ties = _ties(module, order.original)
    reasons = {name: _reason(name, layer, order, scheme, ties) for name, layer in layers.items()}
    if all(reasons.values()):
        name, reason = next(iter(reasons.items()))
        raise NotApplicable(f"{order.wish.method}: no linear layer can be quantized; {name}: {reason}")
    weights = decode(order.original.manifest, order.original.cache, "cpu")
    parameters = {parameter: tensor for tensor, parameter in binding.items()}
    rows: dict[str, VariantTensor] = {}
    promised = 0.0
    for done, (name, layer) in enumerate(layers.items()):
        if (tensor := parameters.get(f"{name}.weight")) is None:
            continue  # tied, and stored under its other name
        if reason := reasons[name]:
            rows[tensor] = report.kept(tensor, weights[tensor], reason)
        else:
            promised += scheme.promised(layer.weight)
            weights[tensor], rows[tensor] = _one(name, layer, tensor, weights[tensor], scheme, order)
        order.progress(done / len(layers))
    for tensor, value in weights.items():
        shared = ties.get(binding[tensor])
        rows.setdefault(tensor, report.kept(tensor, value, _TIED.format(shared) if shared else ""))
    promised += sum(row.bytes_out for row in rows.values() if row.action == report.KEPT)
    return _save(order, weights, tuple(rows[name] for name in sorted(rows)), scheme, promised, computed)


def _one(
    name: str, layer: nn.Linear, tensor: str, original: torch.Tensor, scheme: _Scheme, order: Order
) -> tuple[torch.Tensor, VariantTensor]:
    """Quantize one layer in place: (its weight on CPU, its row). Raises BuildFailed naming it."""
    with torchao_format.quiet():
        from torchao.quantization import quantize_

        try:
            quantize_(layer, scheme.config)
        except (AssertionError, ValueError, NotImplementedError, RuntimeError, ImportError) as exc:
            if out_of_memory(exc):
                raise
            raise BuildFailed(f"{name}: torchao cannot quantize it: {exc}") from exc
    weight = layer.weight.detach()
    if not torchao_format.is_quantized(weight):
        raise BuildFailed(f"{name}: torchao left it as it was ({list(layer.weight.shape)})")
    restored = _restored(layer)
    weight = weight.cpu()
    action = _ACTION[order.wish.method.partition("-")[0]]
    size = torchao_format.nbytes(weight)
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # one layer at a time is in memory twice
    return weight, report.changed(tensor, action, original, restored, bytes_out=size)


def _restored(layer: nn.Linear) -> torch.Tensor:
    """The weight that the layer acts by, in floats; where the subclass cannot say, by what it does to unit vectors."""
    weight: Any = layer.weight.detach()
    if hasattr(weight, "dequantize") and type(weight).__name__ != "Int4TilePackedTo4dTensor":
        restored: torch.Tensor = weight.dequantize()
        return restored
    units = torch.eye(layer.in_features, device=weight.device, dtype=weight.dtype)
    return nn.functional.linear(units, layer.weight).T


def _save(
    order: Order,
    weights: Mapping[str, torch.Tensor],
    rows: tuple[VariantTensor, ...],
    scheme: _Scheme,
    promised: float,
    computed: torch.dtype,
) -> Built:
    parts, metadata = torchao_format.flatten(weights)
    path = order.folder / "model.safetensors"
    save_file(parts, path, metadata)
    made_by = torchao_format.minor()
    details = {"torchao": made_by} | ({"device": "cuda"} if scheme.cuda else {})
    own = datatypes.to_safetensors(datatypes.from_torch(computed))
    return Built(
        files={"model.safetensors": path},
        tensors=rows,
        engine={**ENGINE, "torchao": made_by},
        encoding=Encoding(kind="torchao", details=details),
        promised_ratio=promised / max(1, sum(row.bytes_in for row in rows)),
        compute_dtypes=(_COMPUTED.get(order.wish.method, own),),
        notes=_notes(order.wish.method, scheme),
    )


def _notes(method: str, scheme: _Scheme) -> tuple[str, ...]:
    if method == "int8-dynamic":
        return ("a CPU without VNNI may saturate in int8: its golden check refuses the variant then",)
    if scheme.bits == 4 and not scheme.cuda:
        return ("torchao keeps one byte for each int4 weight in memory; the file holds half a byte",)
    return ()


def _reason(name: str, layer: nn.Linear, order: Order, scheme: _Scheme, ties: Mapping[str, str]) -> str:
    """Why a layer stays; empty: it is quantized."""
    if pattern := report.skipped(f"{name}.weight", order.wish.skip):
        return f"skipped by {pattern}"
    if shared := ties.get(f"{name}.weight"):
        return _TIED.format(shared)
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "the attention around it reads its weight directly"
    columns = layer.weight.shape[1]
    if scheme.group is not None and columns % scheme.group:
        return f"{columns} columns do not divide into groups of {scheme.group}"
    if not layer.weight.numel():
        return "it is empty"
    return ""


def _ties(module: nn.Module, original: Original) -> dict[str, str]:
    """{parameter: another that is the same tensor}."""
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if value.numel():
            groups.setdefault((value.data_ptr(), tuple(value.shape)), []).append(name)
    ties = {
        name: next(other for other in names if other != name)
        for names in groups.values()
        for name in names
        if len(names) > 1
    }
    bound = set(original.manifest.binding.values())
    unbound = [name for name in module.state_dict() if name not in bound and name not in ties]
    return ties | dict.fromkeys(unbound, "a parameter that the checkpoint holds under another name")


def _scheme(order: Order, computed: torch.dtype) -> _Scheme:
    with torchao_format.quiet():
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Float8WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
        )
    match order.wish.method:
        case "int8-weight-only":
            return _Scheme(Int8WeightOnlyConfig(), None, 8, 5)
        case "int8-dynamic":
            return _Scheme(Int8DynamicActivationInt8WeightConfig(), None, 8, 5)
        case "fp8-weight-only":
            return _Scheme(Float8WeightOnlyConfig(), None, 8, 4)
        case "fp8-dynamic":
            return _Scheme(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), None, 8, 4)
        case "int4-weight-only":
            return _int4(order.wish.group, order.original.device, computed)
        case other:
            raise BuildFailed(f"{other} is no method of torchao's here")


def _int4(group: int, device: str, computed: torch.dtype) -> _Scheme:
    """CUDA's tiled int4 in bf16, where it takes the group; else groups that are dequantized in each call, anywhere."""
    with torchao_format.quiet():
        from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from torchao.quantization.quantize_.workflows.int4.int4_packing_format import Int4PackingFormat
    tiled = device.startswith("cuda") and computed is torch.bfloat16 and group in _TILE_GROUPS
    if tiled and torch.cuda.get_device_capability(device) >= _TILES_CAPABILITY:
        config = Int4WeightOnlyConfig(group_size=group, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
        return _Scheme(config, group, 4, 4, cuda=True)
    int4: Any = torch.int4  # type: ignore[attr-defined]  # torch's stubs do not name it
    config = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(group))
    return _Scheme(config, group, 4, computed.itemsize + 1)


def _require_device(method: str, device: str) -> None:
    if method != "fp8-dynamic":
        return
    if not device.startswith("cuda"):
        raise NotApplicable(f"{method} needs CUDA of capability 8.9 or newer; this worker's device is {device}")
    if (seen := torch.cuda.get_device_capability(device)) < _FP8_CAPABILITY:
        raise NotApplicable(f"{method} needs CUDA of capability 8.9 or newer; {device} has {seen[0]}.{seen[1]}")
