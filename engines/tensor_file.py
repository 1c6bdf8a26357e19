"""Arrays of every datatype of the protocol as safetensors bytes, and back: numpy's own reader has no bfloat16."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors import numpy as numpy_file

from weighbridge.engines import datatypes
from weighbridge.engines.errors import InvalidInput
from weighbridge.engines.protocols import Array


def save(named: Mapping[str, Array]) -> bytes:
    """A safetensors file of these arrays. Raises InvalidInput for a dtype that the format lacks (text, complex)."""
    for name, array in named.items():
        if array.dtype.kind not in "biufV":
            raise InvalidInput(f"{name}: arrays of {array.dtype} cannot be kept")
    return numpy_file.save({name: np.ascontiguousarray(array) for name, array in named.items()})


def load(data: bytes) -> dict[str, Array]:
    """The arrays by name. Raises InvalidInput: no safetensors file, or a dtype that the protocol lacks."""
    try:
        found = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as exc:
        raise InvalidInput(f"it is no readable safetensors file: {exc}") from exc
    arrays = {}
    for name, tensor in found:
        try:
            dtype = datatypes.to_numpy(datatypes.from_safetensors(tensor["dtype"]))
        except KeyError as exc:
            raise InvalidInput(f"{name} is of {tensor['dtype']}, which no datatype of the protocol is") from exc
        arrays[name] = np.frombuffer(tensor["data"], dtype=dtype).reshape(tensor["shape"])
    return arrays
