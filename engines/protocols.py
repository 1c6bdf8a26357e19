"""What an engine is to everyone else: `load` gives a `Session`, a `Session` answers `infer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from weighbridge.engines.manifest import Manifest, TensorSpec

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
"""Arrays by tensor name; BF16 travels as `ml_dtypes.bfloat16`, BYTES as object arrays of bytes."""

BlobPath = Callable[[str], Path]
"""Where the verified bytes of a digest lie on this machine. Raises LookupError when they are not here."""


class Session(Protocol):
    """A loaded artifact, ready to run on one device. Not thread-safe: one caller at a time."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run one batch. Raises InvalidInput naming the tensor and the rule (name, datatype, shape)."""
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    def load(self, manifest: Manifest, blobs: BlobPath, *, device: str = "cpu") -> Session:
        """Load, bind and prepare. Raises LoadError (wrong binding, factory not allowed, program digest differs …)."""
        ...
