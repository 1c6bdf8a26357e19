"""The original as a module with its weights, for the methods that look inside it."""

from __future__ import annotations

from torch import nn

from weighbridge.engines.torch_engine import TorchEngine
from weighbridge.workers.compression.types import Original


def open_module(original: Original) -> nn.Module:
    """The original's program, bound: it takes and returns flat positional tensors. Raises LoadError."""
    engine = TorchEngine(original.factories, threads=original.threads)
    return engine.load(original.manifest, original.cache, device=original.device).module
