"""The reference golden on this host: its inputs are the warm-up, its recorded outputs the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from weighbridge.engines import manifest
from weighbridge.engines.errors import GoldenMismatch, LoadError
from weighbridge.engines.protocols import Array


@dataclass(frozen=True)
class Golden:
    """Inputs and recorded outputs by tensor name, and what difference is admitted."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    rtol: float
    atol: float

    @classmethod
    def read(cls, spec: manifest.Golden, path: Path) -> Golden:
        """From the golden's safetensors file. Raises LoadError when it proves nothing."""
        tensors = load_file(path)
        inputs = {name[6:]: array for name, array in tensors.items() if name.startswith("input.")}
        outputs = {name[7:]: array for name, array in tensors.items() if name.startswith("output.")}
        if not inputs or not outputs:
            raise LoadError(f"reference golden {spec.digest} has no input.* or no output.* tensors")
        return cls(inputs, outputs, spec.rtol, spec.atol)

    def check(self, seen: Mapping[str, Array]) -> float:
        """The largest absolute difference. Raises GoldenMismatch where one exceeds atol + rtol · |recorded|."""
        return max((self._difference(name, seen.get(name)) for name in self.outputs), default=0.0)

    def _difference(self, name: str, seen: Array | None) -> float:
        recorded = np.asarray(self.outputs[name], dtype=np.float64)
        if seen is None or seen.shape != recorded.shape:
            shape = None if seen is None else list(seen.shape)
            raise GoldenMismatch(f"output {name!r} has shape {shape}, not {list(recorded.shape)}", worst=np.inf)
        difference = np.abs(np.asarray(seen, dtype=np.float64) - recorded)
        excess = difference - (self.atol + self.rtol * np.abs(recorded))
        if not (excess <= 0).all():  # a NaN compares false and so fails
            worst = float(np.nan_to_num(excess, nan=np.inf).max())
            raise GoldenMismatch(f"output {name!r} exceeds the golden's tolerance by {worst:.3g}", worst=worst)
        return float(difference.max(initial=0.0))
