"""What one pass over a checkpoint tells of a tensor, and how the elements of each dtype are looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from weighbridge.storage.safetensors_header import TensorInfo

FLOATS: Mapping[str, torch.dtype] = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.float32,  # as pairs
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The safetensors dtypes that hold non-finite values; F4 and F6 have none, nor have integers."""
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""By bytes, what is compared with zero."""


def width(info: TensorInfo) -> int:
    """Bytes that are looked at together: an element, half of a complex one, or what several short ones share."""
    kind = FLOATS.get(info.dtype)
    elements = math.prod(info.shape)
    return kind.itemsize if kind else max(1, (info.end - info.start) // elements if elements else 1)


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What one pass tells of a tensor. `minimum` to `rms` are None where it holds no finite float."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    nonfinite: int
    zeros: int
    """Elements whose bits are all zero."""
    minimum: float | None
    maximum: float | None
    rms: float | None
    """Of large 16-bit tensors a sample: every fourth run of 4,096 elements. All else is exact."""
    offset: int = 0
    """Where its bytes begin in the file."""
    last: bool = False
    """Whether no other's come after them."""
    zero_tail: int = 0
    """Bytes of the run of zeros that it ends in: all of them where it is wholly zero."""
    hole: int = 0
    """Bytes of the longest run of zeros that values follow, where it is found: every one of a look's size is."""

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def constant(self) -> bool:
        """All values are one value (never said of fewer than two)."""
        return self.count > 1 and self.minimum is not None and self.minimum == self.maximum
