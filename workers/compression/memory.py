"""Give memory back between two attempts."""

from __future__ import annotations

import gc

import torch


def release() -> None:
    """Give back what an attempt that failed still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
