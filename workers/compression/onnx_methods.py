"""The ONNX methods: the exported program itself, in half precision, and onnxruntime's forms of quantization.

Every method exports, proves that onnxruntime answers as torch does, lets a library change the weights, reads the result
back, and refuses a result in which no weight was changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from blake3 import blake3
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

from weighbridge.engines import hardware
from weighbridge.engines.errors import EngineError
from weighbridge.engines.manifest import ArtifactFile, Program
from weighbridge.engines.onnx_engine import OnnxEngine
from weighbridge.engines.protocols import Array
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression import onnx_export, onnx_weights, report
from weighbridge.workers.compression.onnx_export import Exported
from weighbridge.workers.compression.onnx_weights import Weight
from weighbridge.workers.compression.types import BuildFailed, Built, NotApplicable, Order
from weighbridge.workers.ours import out_of_memory

FILE = "model.onnx"
_ENGINE = {"name": "onnxruntime", "minimum": "1.18"}
"""The first that reads IR version 10, which the exporter writes."""
_ENGINE_8_BITS = {"name": "onnxruntime", "minimum": "1.22"}
"""The first whose MatMulNBits takes 8 bits on a CPU."""
_BATCH_NOTE = "activations share a scale over a whole batch: a row's answer depends a little on its neighbours"
_CALIBRATION_BATCH = 32
_SCALE_BYTES, _BIAS_BYTES = 5, 8
"""Of a channel: a scale and a zero point; those that a quantized bias has on top of itself."""
_LARGEST_HALF = 65504.0
_KERNEL_NOTE = "the kernel rounds activations to int8 by blocks (accuracy_level 4); that of float32 is slower than none"


@dataclass(frozen=True)
class _Task:
    """What a method is given; `others`: the nodes to leave alone."""

    order: Order
    model: onnx.ModelProto
    others: list[str]
    path: Path


@dataclass(frozen=True)
class _Changed:
    """A produced model, with what a method alone knows of it."""

    model: onnx.ModelProto
    notes: tuple[str, ...] = ()
    calibrated: bool = False
    per_batch: bool = False


@dataclass(frozen=True)
class _Form:
    """A method. `operand`: {operator: which input its weight is}, none: every float. `promise`: bytes of a weight."""

    change: Callable[[_Task], _Changed]
    operand: Mapping[str, int]
    promise: Callable[[Weight, int], float]
    computed: tuple[str, ...]
    engine: Mapping[str, str] | None = None
    plainly: bool = False
    """Gemm becomes MatMul and Add first."""


def build(order: Order) -> Built:
    """Export, change, read back. Raises NotApplicable, BuildFailed; MemoryError where a smaller batch may help."""
    wish, form = order.wish, _FORMS[order.wish.method]
    _require(order)
    exported = onnx_export.export(order.original)
    order.progress(0.4)
    for seen, (_, expected) in zip(_run(order, exported), exported.trials, strict=True):
        onnx_export.compare(seen, expected)
    order.progress(0.5)
    if form.plainly:
        onnx_weights.multiply_plainly(exported.model)
    reasons = _reasons(order, exported, form)
    fit = _candidates(exported, form)
    chosen = {name: weight for name, weight in fit.items() if name not in reasons}
    if not chosen and wish.method != "onnx":
        raise NotApplicable(f"{wish.method}: no weight can be changed; {_first(reasons)}")
    left = [node.name for node in exported.model.graph.node if set(node.input) & reasons.keys()]
    given = onnx.ModelProto()
    given.CopyFrom(exported.model)
    changed = _change(form, _Task(order, given, left, order.folder / "made.onnx"))
    order.progress(0.9)
    return _built(order, exported, changed, chosen, reasons)


def _change(form: _Form, task: _Task) -> _Changed:
    """Let the library work. Raises BuildFailed with what it said, MemoryError as it comes."""
    try:
        with onnx_export.quiet():
            return form.change(task)
    except Exception as exc:  # the quantizers raise of every kind
        if out_of_memory(RuntimeError(str(exc))) or isinstance(exc, MemoryError):
            raise MemoryError(str(exc)) from exc  # onnxruntime's exceptions are no RuntimeError
        raise BuildFailed(f"onnxruntime cannot build it: {type(exc).__name__}: {exc}") from exc
    finally:
        task.path.unlink(missing_ok=True)


def _require(order: Order) -> None:
    method, manifest, group = order.wish.method, order.original.manifest, order.wish.group
    if manifest.engine.get("name", "torch") != "torch":
        raise NotApplicable(f"{method}: the original is no torch program")
    if method in ("onnx-int8-weight-only", "onnx-int4-weight-only") and (group < 16 or group & (group - 1)):
        raise NotApplicable(f"{method}: a group of {group}: onnxruntime takes powers of two from 16")


def _run(order: Order, exported: Exported) -> list[dict[str, Array]]:
    """The answers of the engine that hosts have, to each trial."""
    path = order.folder / "exported.onnx"
    digest = _write(exported.model, path)
    manifest = order.original.manifest.model_copy(
        update={
            "files": (ArtifactFile(path=FILE, size=path.stat().st_size, digest=digest),),
            "program": Program(kind="onnx", name=FILE, digest=digest),
            "binding": {},
            "engine": _ENGINE,
            "encoding": None,
        }
    )
    try:
        session = OnnxEngine(threads=order.original.threads).load(manifest, lambda _: path)
        return [session.infer(inputs) for inputs, _ in exported.trials]
    except EngineError as exc:
        raise BuildFailed(f"the exported program does not run: {exc}") from exc
    finally:
        path.unlink(missing_ok=True)


def _write(model: onnx.ModelProto, path: Path) -> str:
    """Write one self-contained file; its BLAKE3."""
    data = model.SerializeToString()
    path.write_bytes(data)
    return blake3(data).hexdigest()


def _candidates(exported: Exported, form: _Form) -> dict[str, Weight]:
    """What the method is for: the operators' weights, or every float that is a parameter's."""
    if form.operand:
        return onnx_weights.weights(exported.model, form.operand)
    named = {name for held in exported.initializers.values() for name in held}
    return {
        name: Weight(name, tuple(tensor.dims), "", ())
        for name, tensor in onnx_weights.initializers(exported.model).items()
        if name in named and tensor.data_type == onnx.TensorProto.FLOAT
    }


def _reasons(order: Order, exported: Exported, form: _Form) -> dict[str, str]:
    """{initializer that the wish or its values keep from being changed: why}."""
    patterns = onnx_weights.skipped(exported.initializers, order.wish.skip)
    reasons = {name: f"skipped by {pattern}" for name, pattern in patterns.items()}
    if order.wish.method == "onnx-fp16":
        for name, tensor in onnx_weights.initializers(exported.model).items():
            value = numpy_helper.to_array(tensor)
            if value.dtype == np.float32 and value.size and (largest := float(np.abs(value).max())) > _LARGEST_HALF:
                reasons.setdefault(name, f"fp16 holds up to {_LARGEST_HALF:g}, it has {largest:g}")
    return reasons


def _first(reasons: Mapping[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in reasons.items()), "the program has no such layer")


def _built(
    order: Order, exported: Exported, changed: _Changed, chosen: Mapping[str, Weight], reasons: Mapping[str, str]
) -> Built:
    form = _FORMS[order.wish.method]
    _must_have_changed(order, exported, changed.model, chosen, reasons)

    def reason(name: str) -> str:
        tensor = onnx_weights.initializers(exported.model)[name]
        small = report.SMALL if len(tensor.dims) < 2 else ""
        if order.wish.method == "onnx":
            return "the method exports what it finds"
        return (
            reasons.get(name) or small or f"{order.wish.method} is not for {onnx_weights.readers(exported.model, name)}"
        )

    tensors = onnx_weights.rows(order.original, exported, changed.model, reason)
    path = order.folder / FILE
    digest = _write(changed.model, path)
    return Built(
        files={FILE: path},
        tensors=tensors,
        engine=dict(form.engine or _ENGINE),
        program=Program(kind="onnx", name=FILE, digest=digest),
        binding={},
        promised_ratio=_promised(exported, chosen, form, order.wish.group, tensors),
        compute_dtypes=form.computed,
        per_batch=changed.per_batch,
        notes=changed.notes,
        calibration=order.data.origin if changed.calibrated else None,
    )


def _must_have_changed(
    order: Order,
    exported: Exported,
    model: onnx.ModelProto,
    chosen: Mapping[str, Weight],
    reasons: Mapping[str, str],
) -> None:
    """No silent no-op: every weight that was to be changed is, read back from the produced model; no other is."""
    before = onnx_weights.initializers(exported.model)
    for name in reasons:
        held = onnx_weights.stored(model, name, before[name].dims)
        if held is not None and held.action != report.KEPT:
            raise BuildFailed(f"{name}: onnxruntime changed what must stay ({reasons[name]})")
    for name, weight in chosen.items() if order.wish.method != "onnx" else ():
        held = onnx_weights.stored(model, name, weight.shape)
        if held is None or held.action == report.KEPT:
            readers = onnx_weights.readers(exported.model, name)
            raise BuildFailed(f"{name}: onnxruntime left it as it was, an operand of {readers}")


def _promised(
    exported: Exported, chosen: Mapping[str, Weight], form: _Form, group: int, tensors: Sequence[VariantTensor]
) -> float:
    """Bytes of all initializers, constants of the program included, as the method should write them."""
    before = onnx_weights.initializers(exported.model)
    out = sum(
        form.promise(chosen[name], group) if name in chosen else numpy_helper.to_array(tensor).nbytes
        for name, tensor in before.items()
    )
    return out / max(1, sum(row.bytes_in for row in tensors))


def _plain(task: _Task) -> _Changed:
    return _Changed(task.model)


def _half(task: _Task) -> _Changed:
    made = convert_float_to_float16(task.model, keep_io_types=True, node_block_list=task.others)
    return _Changed(made)


def _dynamic(task: _Task) -> _Changed:
    reduced, notes = _range()
    quantize_dynamic(
        task.model,
        task.path,
        op_types_to_quantize=list(_DYNAMIC),
        per_channel=True,
        reduce_range=reduced,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=task.others,
        extra_options={"MatMulConstBOnly": True},
    )
    return _Changed(onnx.load(task.path), (*notes, _BATCH_NOTE), per_batch=True)


def _static(task: _Task) -> _Changed:
    reduced, notes = _range()
    quantize_static(
        task.model,
        task.path,
        _Rows(task.order, _CALIBRATION_BATCH),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(_STATIC_OPERATORS),
        per_channel=True,
        reduce_range=reduced,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=task.others,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"MatMulConstBOnly": True},
    )
    return _Changed(onnx.load(task.path), notes, calibrated=True)


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    """The order's data, as the calibration takes it: one batch after the other, without labels."""

    def __init__(self, order: Order, batch: int) -> None:
        self._names = {spec.name for spec in order.original.manifest.inputs}
        self._batches: Iterator[Any] = iter(order.data.batches(order.wish.calibration_rows, batch))

    def get_next(self) -> dict[str, Array] | None:
        given = next(self._batches, None)
        return None if given is None else {name: array for name, array in given.items() if name in self._names}


def _groups(bits: int) -> Callable[[_Task], _Changed]:
    def change(task: _Task) -> _Changed:
        config = DefaultWeightOnlyQuantConfig(
            block_size=task.order.wish.group,
            is_symmetric=bits == 8,  # 4 bits: zero points cost 2% of the bytes and take 6% off the error
            accuracy_level=4,
            bits=bits,
        )
        quantizer = MatMulNBitsQuantizer(task.model, algo_config=config, nodes_to_exclude=task.others)
        quantizer.process()
        made: onnx.ModelProto = quantizer.model.model
        return _Changed(made, (_KERNEL_NOTE,))

    return change


def _range() -> tuple[bool, tuple[str, ...]]:
    """(whether weights get 7 bits, notes). Without VNNI, x86 adds two products of u8 and s8 in 16 bits, which saturate.

    onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "When to use S8 or U8".
    """
    sets = set(hardware.describe("cpu").capability.split())
    if not sets & {"avx2", "avx512f"} or sets & {"avx_vnni", "avx512_vnni", "amx_int8"}:
        return False, ("weights use 8 bits: hosts without VNNI saturate, and their golden check may refuse it",)
    return True, ("weights use 7 bits: this worker's processor has no VNNI",)


def _grouped(bits: int) -> Callable[[Weight, int], float]:
    def promise(weight: Weight, group: int) -> float:
        depth, columns = weight.shape
        blocks = -(-depth // group)
        zeros = columns * -(-blocks // 2) if bits == 4 else 0
        return columns * blocks * (group * bits / 8 + 4) + zeros

    return promise


def _by_channel(weight: Weight, group: int) -> float:
    if weight.operator in ("Conv", "Gemm"):
        return math.prod(weight.shape) + weight.shape[0] * (_SCALE_BYTES + _BIAS_BYTES)
    return math.prod(weight.shape) + weight.shape[-1] * _SCALE_BYTES


def _floats(size: int) -> Callable[[Weight, int], float]:
    return lambda weight, group: math.prod(weight.shape) * size


_PRODUCTS = {"MatMul": 1}
_DYNAMIC = {"MatMul": 1, "Gather": 0}
_STATIC = {"Conv": 1, "Gemm": 1, "MatMul": 1}
_STATIC_OPERATORS = (
    *_STATIC,
    "Relu",
    "Clip",
    "Add",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Concat",
    "Flatten",
)
_FORMS = {
    "onnx": _Form(_plain, {}, _floats(4), ("F32",)),
    "onnx-fp16": _Form(_half, {}, _floats(2), ("F16",)),
    "onnx-int8-dynamic": _Form(_dynamic, _DYNAMIC, _by_channel, ("I8",), plainly=True),
    "onnx-int8-static": _Form(_static, _STATIC, _by_channel, ("I8",)),
    "onnx-int8-weight-only": _Form(_groups(8), _PRODUCTS, _grouped(8), ("I8",), _ENGINE_8_BITS, plainly=True),
    "onnx-int4-weight-only": _Form(_groups(4), _PRODUCTS, _grouped(4), ("I8",), plainly=True),
}
METHODS = tuple(_FORMS)
