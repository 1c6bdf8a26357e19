"""Which weights of an ONNX model a method can change, what became of each: the rows of the report.

A produced model is read back as it stands: the quantizers' initializers, dequantized, against those before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from weighbridge.engines import datatypes
from weighbridge.engines.binding import normal_name
from weighbridge.engines.encodings import decode
from weighbridge.engines.protocols import Array
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression import report
from weighbridge.workers.compression.onnx_export import Exported
from weighbridge.workers.compression.types import Original

_QUANTIZED = "_quantized"


@dataclass(frozen=True)
class Weight:
    """A constant float32 operand of `nodes`, all of one operator; `shape` as the model has it."""

    name: str
    shape: tuple[int, ...]
    operator: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """How an initializer is held: `bytes` with its scales; `value`: what the operators compute with."""

    action: str
    bytes: int
    value: Array


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {one.name: one for one in model.graph.initializer}


def weights(model: onnx.ModelProto, operand: Mapping[str, int]) -> dict[str, Weight]:
    """The weights that only operators of `operand` {type: which input} read there, in that place; by name."""
    held = initializers(model)
    uses = _uses(model)
    found = {}
    for name, tensor in held.items():
        kinds = {node.op_type for node, _ in uses[name]}
        placed = all(operand.get(node.op_type) == index for node, index in uses[name])
        if len(kinds) == 1 and placed and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            nodes = tuple(node.name for node, _ in uses[name])
            found[name] = Weight(name, tuple(tensor.dims), kinds.pop(), nodes)
    return found


def readers(model: onnx.ModelProto, name: str) -> str:
    """The operators that read an initializer, for people: `LayerNormalization, Add`."""
    return ", ".join(sorted({node.op_type for node, _ in _uses(model)[name]})) or "nothing"


def _uses(model: onnx.ModelProto) -> Mapping[str, list[tuple[onnx.NodeProto, int]]]:
    uses: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            uses[name].append((node, index))
    return uses


def skipped(parameters: Mapping[str, Sequence[str]], patterns: Sequence[str]) -> dict[str, str]:
    """{initializer of a parameter that the wish skips: the pattern}."""
    return {
        initializer: pattern
        for parameter, held in parameters.items()
        if (pattern := report.skipped(normal_name(parameter), patterns))
        for initializer in held
    }


def multiply_plainly(model: onnx.ModelProto) -> None:
    """Write each Gemm with constant weights as MatMul and Add: MatMulNBits and quantize_dynamic know no Gemm."""
    held = initializers(model)
    uses = _uses(model)
    nodes = []
    for node in model.graph.node:
        said = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        scaled = said.get("alpha", 1.0) != 1.0 or said.get("beta", 1.0) != 1.0 or said.get("transA", 0)
        if node.op_type != "Gemm" or scaled or node.input[1] not in held or len(uses[node.input[1]]) > 1:
            nodes.append(node)
            continue
        if said.get("transB", 0):
            tensor = held[node.input[1]]
            turned = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
            tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
        biased = len(node.input) > 2 and node.input[2]
        product = f"{node.output[0]}_product" if biased else node.output[0]
        nodes.append(onnx.helper.make_node("MatMul", node.input[:2], [product], name=f"{node.name}_product"))
        if biased:
            nodes.append(onnx.helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}_bias"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def stored(model: onnx.ModelProto, weight: str, shape: Sequence[int]) -> Stored | None:
    """How a produced model holds the initializer that was called `weight` and had `shape`; None: no more."""
    held = initializers(model)
    for bits in (4, 8):
        if f"{weight}_Q{bits}" in held:
            return _by_groups(held, weight, shape, bits)
    if weight + _QUANTIZED in held:
        return _by_channels(model, held, weight)
    if weight not in held:
        return None
    value = numpy_helper.to_array(held[weight])
    half = held[weight].data_type == onnx.TensorProto.FLOAT16
    return Stored("cast to fp16" if half else report.KEPT, value.nbytes, value)


def _by_channels(model: onnx.ModelProto, held: Mapping[str, onnx.TensorProto], weight: str) -> Stored:
    # The quantizers name a bias's scale after its quantized form, a weight's after the weight.
    own = weight + _QUANTIZED
    prefix = own if f"{own}_scale" in held else weight
    codes = numpy_helper.to_array(held[own])
    scale, zero = (numpy_helper.to_array(held[f"{prefix}_{part}"]) for part in ("scale", "zero_point"))
    axis = _axis(model, own, codes.ndim)
    along = [-1 if index == axis else 1 for index in range(codes.ndim)] if scale.size > 1 else [1] * codes.ndim
    value = (codes.astype(np.float32) - zero.reshape(along).astype(np.float32)) * scale.reshape(along)
    action = f"{codes.dtype} per {'channel' if scale.size > 1 else 'tensor'}"
    return Stored(action, codes.nbytes + scale.nbytes + zero.nbytes, value)


def _axis(model: onnx.ModelProto, codes: str, rank: int) -> int:
    """The axis that a DequantizeLinear of the codes names; integer products have one scale a column."""
    for node, _ in _uses(model)[codes]:
        for attribute in node.attribute:
            if node.op_type == "DequantizeLinear" and attribute.name == "axis":
                return int(attribute.i) % rank
    return rank - 1


def _by_groups(held: Mapping[str, onnx.TensorProto], weight: str, shape: Sequence[int], bits: int) -> Stored:
    """Of MatMulNBits: codes (columns, blocks, bytes of a block), low half first; scales and zero points a block.

    onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """
    depth, columns = shape
    packed = numpy_helper.to_array(held[f"{weight}_Q{bits}"])
    scale = numpy_helper.to_array(held[f"{weight}_scales"]).reshape(columns, -1, 1)
    size = packed.nbytes + scale.nbytes
    zero: Array = np.array(2 ** (bits - 1), dtype=np.float32)
    if f"{weight}_zero_points" in held:
        raw = numpy_helper.to_array(held[f"{weight}_zero_points"])
        size += raw.nbytes
        zero = _unpacked(raw.reshape(columns, -1), bits)[:, : scale.shape[1], None]
    codes = _unpacked(packed, bits)
    value = ((codes - zero) * scale).reshape(columns, -1)[:, :depth].T
    return Stored(f"int{bits} groups of {codes.shape[-1]}", size, value)


def _unpacked(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed.astype(np.float32)
    halves = np.stack((packed & 0x0F, packed >> 4), axis=-1)
    return halves.reshape(*packed.shape[:-1], -1).astype(np.float32)


def rows(
    original: Original, exported: Exported, after: onnx.ModelProto, reason: Callable[[str], str]
) -> tuple[VariantTensor, ...]:
    """One row a tensor of the original's files. `reason(initializer)`: why the method keeps it."""
    before = initializers(exported.model)
    owner: dict[str, str] = {}
    made = []
    for tensor, value in sorted(decode(original.manifest, original.cache, "cpu").items()):
        held = exported.initializers.get(original.manifest.binding[tensor], ())
        own = [name for name in held if owner.setdefault(name, tensor) == tensor]
        found = {name: one for name in own if (one := stored(after, name, before[name].dims)) is not None}
        if found:
            made.append(_row(tensor, value.nbytes, found, exported, reason))
            continue
        why = f"equal to {owner[held[0]]}, which is stored once" if held else "the exporter folded it into others"
        made.append(VariantTensor(name=tensor, action="merged", reason=why, bytes_in=value.nbytes))
    return tuple(made)


def _row(
    tensor: str, size: int, found: Mapping[str, Stored], exported: Exported, reason: Callable[[str], str]
) -> VariantTensor:
    """Where several initializers hold one tensor, the bytes of all and the worst ratio."""
    before = initializers(exported.model)
    kept = [name for name, one in found.items() if one.action == report.KEPT]
    ratios = [_ratio(numpy_helper.to_array(before[name]), one.value) for name, one in found.items() if name not in kept]
    return VariantTensor(
        name=tensor,
        action=", ".join(sorted({one.action for one in found.values()})),
        reason="; ".join(sorted({_reason(name, exported, reason(name)) for name in kept})),
        bytes_in=size,
        bytes_out=sum(one.bytes for one in found.values()),
        sqnr=min((ratio for ratio in ratios if ratio is not None), default=None),
    )


def _reason(name: str, exported: Exported, why: str) -> str:
    return f"{why} (in fp32, with what the exporter folded into it)" if name in exported.folded else why


def _ratio(before: Array, after: Array) -> float | None:
    return report.sqnr(*(datatypes.array_to_tensor(np.array(one, dtype=np.float32)) for one in (before, after)))
