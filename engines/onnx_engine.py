"""The ONNX engine: one self-contained `.onnx` file, run by onnxruntime; numpy in and out. Imports without torch.

onnxruntime is imported by the first load, not before: a host forks its engine children, and threads do not survive.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from weighbridge.engines import tensors
from weighbridge.engines.blobs import read
from weighbridge.engines.errors import EngineError, LoadError
from weighbridge.engines.manifest import Manifest, TensorSpec
from weighbridge.engines.onnx_structure import structure
from weighbridge.engines.protocols import Array, Arrays, BlobPath

CONTRIBUTED = frozenset({"MatMulNBits"})
"""Operators of onnxruntime's own domain `com.microsoft` that the methods of compression write."""
_BFLOAT16 = 16
"""onnx.TensorProto.BFLOAT16: numpy has no such type, so onnxruntime is given the bits."""
_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}


class OnnxEngine:
    """Loads artifacts whose program is ONNX.

    `threads`: of one operator, in this session; None: OMP_NUM_THREADS, which a host sets for its children, else 1.
    """

    def __init__(self, *, threads: int | None = None) -> None:
        self._threads = threads

    def load(self, manifest: Manifest, blobs: BlobPath, *, device: str = "cpu") -> OnnxSession:
        """Read, verify and prepare. Raises LoadError: bytes, operators or tensors that the manifest does not promise,
        a device that this onnxruntime does not serve, no onnxruntime."""
        runtime = _runtime(manifest)
        data = _verified(manifest, blobs)
        _refuse_strange(manifest.program.name, data)
        providers = _providers(runtime, device)
        try:
            session = runtime.InferenceSession(data, sess_options=self._options(runtime), providers=providers)
        except Exception as exc:  # onnxruntime's exceptions have no common root
            raise LoadError(f"{manifest.program.name}: onnxruntime cannot load it: {exc}") from exc
        _must_match("input", manifest.inputs, session.get_inputs())
        _must_match("output", manifest.outputs, session.get_outputs())
        return OnnxSession(session, manifest, runtime)

    def _options(self, runtime: Any) -> Any:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self._threads or int(os.environ.get("OMP_NUM_THREADS") or 1)
        options.inter_op_num_threads = 1
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.use_deterministic_compute = True
        options.log_severity_level = 4
        # Threads that wait in a loop take the processor of the other variants on the machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


class OnnxSession:
    """A program on one device. Not thread-safe: one caller at a time."""

    def __init__(self, session: Any, manifest: Manifest, runtime: Any) -> None:
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        self._session, self._runtime = session, runtime
        self._names = [spec.name for spec in self.outputs]
        self._bits = any(spec.datatype == "BF16" for spec in (*self.inputs, *self.outputs))

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run one batch. Raises InvalidInput; EngineError when the program itself fails."""
        tensors.check_inputs(inputs, self.inputs)
        if self._session is None:
            raise EngineError("the session is closed")
        try:
            results = self._by_bits(inputs) if self._bits else self._session.run(self._names, dict(inputs))
        except Exception as exc:  # onnxruntime's exceptions have no common root
            raise EngineError(f"the program failed: {exc}") from exc
        return dict(zip(self._names, results, strict=True))

    def close(self) -> None:
        """Let the weights go."""
        self._session = None

    def _by_bits(self, inputs: Arrays) -> list[np.ndarray[Any, Any]]:
        value = self._runtime.OrtValue
        feeds = {
            name: value.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array).view(np.uint16), _BFLOAT16)
            if array.dtype == ml_dtypes.bfloat16
            else value.ortvalue_from_numpy(np.ascontiguousarray(array))
            for name, array in inputs.items()
        }
        results = self._session.run_with_ort_values(self._names, feeds)
        return [_array(result, spec) for result, spec in zip(results, self.outputs, strict=True)]


def _array(result: Any, spec: TensorSpec) -> Array:
    if spec.datatype != "BF16":
        found: Array = result.numpy()
        return found
    shape = tuple(result.shape())
    size = math.prod(shape)
    if size == 0:
        return np.empty(shape, dtype=ml_dtypes.bfloat16)
    bits = ctypes.cast(result.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    array: Array = np.ctypeslib.as_array(bits, (size,)).copy().view(ml_dtypes.bfloat16).reshape(shape)
    return array


def _runtime(manifest: Manifest) -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        raise LoadError(
            f"the artifact needs onnxruntime, which is not installed: pip install 'weighbridge[onnx]' ({exc})"
        ) from exc
    minimum = manifest.engine.get("minimum", "0")
    if _release(onnxruntime.__version__) < _release(minimum):
        raise LoadError(f"the artifact needs onnxruntime {minimum}; this machine has {onnxruntime.__version__}")
    return onnxruntime


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _verified(manifest: Manifest, blobs: BlobPath) -> bytes:
    """The bytes of the artifact's one file, which are those that the manifest names."""
    program = manifest.program
    if program.kind != "onnx" or program.digest is None:
        raise LoadError(f"program {program.name}: onnxruntime runs a program of kind onnx with a digest")
    if [file.digest for file in manifest.files] != [program.digest]:
        raise LoadError(f"program {program.name}: the artifact must be the one file of the program's digest")
    if manifest.binding or manifest.encoding is not None:
        raise LoadError(f"program {program.name}: an ONNX file holds its weights; there is nothing to bind or decode")
    try:
        return read(blobs, program.digest, program.name)
    except (OSError, LookupError) as exc:
        raise LoadError(f"{program.name}: {exc}") from exc


def _refuse_strange(name: str, data: bytes) -> None:
    asks = structure(data)
    if asks.external:
        raise LoadError(f"{name}: tensor {asks.external[0]!r} lies outside the file; external data is not allowed")
    if asks.functions or asks.training:
        raise LoadError(f"{name}: functions and training graphs in the file are not allowed")
    strange = sorted(
        f"{domain}.{operator}" if domain else operator
        for domain, operator in asks.operators
        if domain and (domain != "com.microsoft" or operator not in CONTRIBUTED)
    )
    if strange:
        raise LoadError(f"{name}: operator {strange[0]} is not allowed (standard ONNX and {', '.join(CONTRIBUTED)})")


def _providers(runtime: Any, device: str) -> list[Any]:
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if kind != "cuda" or "CUDAExecutionProvider" not in runtime.get_available_providers():
        offered = ", ".join(runtime.get_available_providers())
        raise LoadError(f"onnxruntime here does not serve {device} (it offers {offered}): install onnxruntime-gpu")
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def _must_match(what: str, specs: Sequence[TensorSpec], seen: Sequence[Any]) -> None:
    """The graph's inputs or outputs are the manifest's: names, datatypes, ranks, and the lengths that both fix."""
    if sorted(spec.name for spec in specs) != sorted(node.name for node in seen):
        names = ", ".join(sorted(node.name for node in seen))
        raise LoadError(f"the program's {what}s are {names}; the manifest names {', '.join(s.name for s in specs)}")
    nodes = {node.name: node for node in seen}
    for spec in specs:
        node = nodes[spec.name]
        if _TYPES.get(node.type) != spec.datatype:
            raise LoadError(f"{what} {spec.name} is {node.type} in the program, {spec.datatype} in the manifest")
        fits = len(node.shape) == len(spec.shape) and all(
            not isinstance(own, int) or own == wanted for own, wanted in zip(node.shape, spec.shape, strict=True)
        )
        if not fits:
            raise LoadError(f"{what} {spec.name} is {node.shape} in the program, {list(spec.shape)} in the manifest")
