"""An original as an ONNX model whose initializers carry its parameters' names, checked against torch.

The exporter renames, transposes, merges and folds weights. Every method quantizes and reports by parameter, so each
initializer is found again: by name, else by its content or that content transposed.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from blake3 import blake3
from onnx import numpy_helper
from torch import nn
from torch.export import Dim

from weighbridge.engines import datatypes, golden, tensors
from weighbridge.engines.blobs import read
from weighbridge.engines.manifest import Manifest, TensorSpec
from weighbridge.engines.program import flat
from weighbridge.engines.protocols import Array, Arrays
from weighbridge.workers.compression import reference
from weighbridge.workers.compression.types import BuildFailed, NotApplicable, Original

PROTOBUF_BYTES = 2**31 - 1
"""No protobuf message is larger, and an artifact of ours is one file."""
OPSET = 20
TOLERANCE = 1e-4
"""Of float32 between onnxruntime and torch, relative to the largest output."""
_LONG = 29
_HALF = ("FP16", "BF16")
_OWN = "weighbridge."
"""Before names that no program has."""
_OPERATOR = re.compile(r"(?:op='|target: )([\w.:]+)|\b(aten[.:]+[\w.]+)")


@dataclass(frozen=True)
class Exported:
    """`model` computes in float32. `initializers`: {parameter: those that hold it}, none where it went into others.

    `folded`: initializers with a parameter's name and other values (a convolution with its batch norm).
    """

    model: onnx.ModelProto
    initializers: dict[str, tuple[str, ...]]
    folded: frozenset[str]
    trials: tuple[tuple[Arrays, Arrays], ...]
    """Inputs and torch's answers: the golden's, and others at the ends of the lengths that the contract allows."""


def export(original: Original) -> Exported:
    """Export with a free batch and free lengths; compare with torch on the golden inputs.

    Raises NotApplicable for what ONNX cannot hold, BuildFailed where its answers differ.
    """
    manifest = original.manifest
    strange = [spec.name for spec in (*manifest.inputs, *manifest.outputs) if spec.datatype == datatypes.BYTES]
    if strange:
        raise NotApplicable(f"{strange[0]} is of BYTES, which the ONNX engine does not take")
    module = _float32(reference.open_module(original), (*manifest.inputs, *manifest.outputs), manifest.outputs)
    _must_fit(module)
    inputs, _ = golden.read(read(original.cache, manifest.golden.digest, "the reference golden"))
    example = tuple(datatypes.array_to_tensor(inputs[spec.name]) for spec in manifest.inputs)
    model = _to_onnx(module, example, manifest.inputs, manifest.outputs)
    state = {name.removeprefix("_program."): value for name, value in module.state_dict().items()}
    trials = tuple((one, _answers(module, one, manifest)) for one in (inputs, *_others(manifest.inputs)))
    return Exported(model, *_named(model, state), trials)


def _others(specs: Sequence[TensorSpec]) -> Iterator[Arrays]:
    """Short and long inputs, where lengths are free and known: the export saw the golden's alone."""
    for size, wanted in ((1, 1), (2, _LONG)):
        if wished := tensors.lengths(specs, wanted):
            yield tensors.synthetic(specs, size=size, seed=wanted, wished=wished)


def _answers(module: nn.Module, inputs: Arrays, manifest: Manifest) -> Arrays:
    given = (datatypes.array_to_tensor(np.ascontiguousarray(inputs[spec.name])) for spec in manifest.inputs)
    with torch.inference_mode():
        results = flat(module(*given))
    return {spec.name: datatypes.tensor_to_array(one) for spec, one in zip(manifest.outputs, results, strict=True)}


def compare(seen: Arrays, expected: Arrays) -> None:
    """Raise BuildFailed where onnxruntime's float32 answers are not torch's."""
    for name, want in expected.items():
        got, wanted = seen[name].astype(np.float64), want.astype(np.float64)
        allowed = TOLERANCE * max(float(np.abs(wanted).max(initial=0)), TOLERANCE)
        worst = float(np.abs(got - wanted).max(initial=0)) if got.shape == wanted.shape else float("inf")
        if want.dtype.itemsize < 4 and want.dtype.kind in "fV":
            allowed *= 100  # rounded once more, to half precision
        if not worst <= allowed:
            raise BuildFailed(f"output {name} of the exported program differs from torch's by {worst:.3g}")


class _InFloat32(nn.Module):
    """A program in half precision, computed in float32, with its own datatypes in and out."""

    def __init__(self, program: nn.Module, outputs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self._program = program
        self._wanted = [datatypes.to_torch(spec.datatype) for spec in outputs]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        halves = (torch.float16, torch.bfloat16)
        results = flat(self._program(*(one.float() if one.dtype in halves else one for one in inputs)))
        return tuple(one.to(wanted) for one, wanted in zip(results, self._wanted, strict=True))


def _float32(module: nn.Module, specs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> nn.Module:
    """A program in half precision runs in float32, whose kernels onnxruntime has on a CPU; finer dtypes stay."""
    for part in module.modules():
        part.training = False  # an exported module refuses eval(); it has no training behaviour left
        part._apply(_widened, recurse=False)  # type: ignore[no-untyped-call]
    return _InFloat32(module, outputs) if any(spec.datatype in _HALF for spec in specs) else module


def _widened(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _must_fit(module: nn.Module) -> None:
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    if size > PROTOBUF_BYTES:
        raise NotApplicable(f"{size} bytes of weights in float32: a self-contained ONNX file holds {PROTOBUF_BYTES}")


def _to_onnx(
    module: nn.Module, example: tuple[torch.Tensor, ...], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> onnx.ModelProto:
    batch = Dim("batch", min=1)
    dynamic: Any = tuple(
        {axis: batch if axis == 0 else Dim.AUTO for axis, length in enumerate(spec.shape) if length == -1}
        for spec in inputs
    )
    with quiet():
        try:
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                dynamic_shapes=(dynamic,) if isinstance(module, _InFloat32) else dynamic,
                input_names=[f"{_OWN}input.{index}" for index in range(len(inputs))],
                output_names=[f"{_OWN}output.{index}" for index in range(len(outputs))],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        except Exception as exc:  # the exporter lets through what its many passes raise
            raise NotApplicable(f"the program cannot be exported to ONNX: {_root(exc)}") from exc
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _strip(model)
    _name(model.graph, inputs, outputs)
    return model


def _name(graph: onnx.GraphProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Give inputs and outputs their names, which values inside may have taken: an embedding's output is `embedding`."""
    wished = {f"{_OWN}input.{index}": spec.name for index, spec in enumerate(inputs)}
    wished |= {f"{_OWN}output.{index}": spec.name for index, spec in enumerate(outputs)}
    inner = {name: f"{name}.{_OWN}inner" for name in wished.values()}
    rename(graph, inner | wished)
    for value in (*graph.input, *graph.output):
        value.name = wished.get(value.name, value.name)


def _strip(model: onnx.ModelProto) -> None:
    """Drop what tells of the worker (stack traces with its paths), and shapes that initializers have by themselves."""
    graph = model.graph
    constant = {one.name for one in graph.initializer}
    shapes = [value for value in graph.value_info if value.name not in constant]
    del graph.value_info[:]
    graph.value_info.extend(shapes)
    for holder in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")


def _root(exc: BaseException) -> str:
    """The operator, where the exporter names one, and what it said first."""
    causes = [exc]
    while (deeper := causes[-1].__cause__) is not None:
        causes.append(deeper)
    said = "\n".join(str(cause) for cause in reversed(causes))
    operator = _OPERATOR.search(said)
    name = next((group for group in operator.groups() if group), "") if operator else ""
    first = next((line.strip() for line in said.splitlines() if line.strip()), type(causes[-1]).__name__)
    return f"{name}: {first}" if name and name not in first else first


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter and the quantizers warn and log about themselves; nothing that an operator can act on."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir", "")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _named(model: onnx.ModelProto, state: dict[str, torch.Tensor]) -> tuple[dict[str, tuple[str, ...]], frozenset[str]]:
    """(every parameter's initializers, the folded ones); those that lost their name get the parameter's."""
    arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    contents: dict[str, list[str]] = defaultdict(list)
    for name, array in arrays.items():
        contents[_content(array)].append(name)
    found: dict[str, tuple[str, ...]] = {}
    folded: set[str] = set()
    renamed: dict[str, str] = {}
    for parameter, value in state.items():
        array = value.detach().cpu().numpy()
        forms = [_content(form) for form in ((array, array.T) if array.ndim == 2 else (array,))]
        same = dict.fromkeys(name for form in forms for name in contents.get(form, []) if array.size > 1)
        if parameter in arrays:
            folded |= set() if _content(arrays[parameter]) in forms else {parameter}
            same = {parameter: None} | {name: None for name in same if name not in state}  # others are merely equal
        for name in same:
            if name not in renamed and name not in state:
                taken = parameter in arrays or parameter in renamed.values()
                renamed[name] = f"{parameter}.{name}" if taken else parameter
        found[parameter] = tuple(renamed.get(name, name) for name in same)
    rename(model.graph, renamed)
    return found, frozenset(folded)


def rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Give values other names, wherever they are made and read; the graph's own inputs and outputs are left."""
    for initializer in graph.initializer:
        initializer.name = names.get(initializer.name, initializer.name)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for index, name in enumerate(node.output):
            node.output[index] = names.get(name, name)
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                rename(inner, names)


def _content(array: Array) -> str:
    return f"{array.dtype}{array.shape}{blake3(array.tobytes()).hexdigest()}"
