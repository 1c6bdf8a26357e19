"""What a spare engine child does before it knows its artifact: import what torch imports only at the first load."""

from __future__ import annotations

import gc

import torch

from weighbridge.engines import template
from weighbridge.engines.manifest import TensorSpec


def warm() -> None:
    """Build and load a template of one layer. It costs two seconds once, and takes one off the first real load.

    Then set aside what is loaded for good: every later collection walks only what came after (0.2 s less with torch).
    """
    template.build(torch.nn.Linear(2, 2), (TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),))
    gc.collect()
    gc.freeze()
