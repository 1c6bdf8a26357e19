"""One table of tensor datatypes: Open Inference Protocol, numpy, safetensors, torch. Imports without torch.

BF16 is `ml_dtypes.bfloat16` in numpy. BYTES is an object array of `bytes` and has no safetensors name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch

_TABLE: tuple[tuple[str, np.dtype[Any], str, str], ...] = (
    # protocol, numpy, safetensors, torch
    ("BOOL", np.dtype(np.bool_), "BOOL", "bool"),
    ("UINT8", np.dtype(np.uint8), "U8", "uint8"),
    ("UINT16", np.dtype(np.uint16), "U16", "uint16"),
    ("UINT32", np.dtype(np.uint32), "U32", "uint32"),
    ("UINT64", np.dtype(np.uint64), "U64", "uint64"),
    ("INT8", np.dtype(np.int8), "I8", "int8"),
    ("INT16", np.dtype(np.int16), "I16", "int16"),
    ("INT32", np.dtype(np.int32), "I32", "int32"),
    ("INT64", np.dtype(np.int64), "I64", "int64"),
    ("FP16", np.dtype(np.float16), "F16", "float16"),
    ("BF16", np.dtype(ml_dtypes.bfloat16), "BF16", "bfloat16"),
    ("FP32", np.dtype(np.float32), "F32", "float32"),
    ("FP64", np.dtype(np.float64), "F64", "float64"),
)
BYTES = "BYTES"
NAMES = (*(row[0] for row in _TABLE), BYTES)
FLOATING = frozenset({"F16", "BF16", "F32", "F64"})
"""The safetensors names that can hold NaN and Inf and that a binding may cast between."""

_TO_NUMPY: dict[str, np.dtype[Any]] = {row[0]: row[1] for row in _TABLE} | {BYTES: np.dtype(object)}
_FROM_NUMPY: dict[np.dtype[Any], str] = {row[1]: row[0] for row in _TABLE} | {np.dtype(object): BYTES}
_TO_SAFETENSORS = {row[0]: row[2] for row in _TABLE}
_FROM_SAFETENSORS = {row[2]: row[0] for row in _TABLE}
_TO_TORCH = {row[0]: row[3] for row in _TABLE}
_FROM_TORCH = {row[3]: row[0] for row in _TABLE}


def to_numpy(datatype: str) -> np.dtype[Any]:
    """The numpy dtype of a protocol datatype. Raises KeyError."""
    return _TO_NUMPY[datatype]


def from_numpy(dtype: np.dtype[Any]) -> str:
    """The protocol datatype of a numpy dtype. Raises KeyError (complex, datetime, big-endian, text …)."""
    return _FROM_NUMPY[dtype]


def to_safetensors(datatype: str) -> str:
    """The safetensors dtype name of a protocol datatype. Raises KeyError for BYTES."""
    return _TO_SAFETENSORS[datatype]


def from_safetensors(name: str) -> str:
    """The protocol datatype of a safetensors dtype name. Raises KeyError (F8_E4M3, F4 … have none)."""
    return _FROM_SAFETENSORS[name]


def to_torch(datatype: str) -> torch.dtype:
    """The torch dtype of a protocol datatype. Raises KeyError for BYTES."""
    import torch

    dtype: torch.dtype = getattr(torch, _TO_TORCH[datatype])
    return dtype


def from_torch(dtype: torch.dtype) -> str:
    """The protocol datatype of a torch dtype. Raises KeyError (complex, quantized, float8 …)."""
    return _FROM_TORCH[str(dtype).removeprefix("torch.")]


def array_to_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """View an array as a CPU tensor; copies only what is read-only, strided backwards or not contiguous."""
    import torch

    writable = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
    if writable.dtype == np.dtype(ml_dtypes.bfloat16):
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)


def tensor_to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """View a detached tensor as an array; copies only from another device."""
    import torch

    local = tensor.detach().cpu().contiguous()
    if local.dtype is torch.bfloat16:
        return local.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: np.ndarray[Any, Any] = local.numpy()
    return array
