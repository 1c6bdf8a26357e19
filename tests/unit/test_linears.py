"""Linear layers that an export took apart come back, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import compression
from torch import nn

from weighbridge.engines import linears, tensors
from weighbridge.engines.torch_engine import TorchEngine, TorchSession


class ByHand(nn.Module):
    """Products written out: addmm and matmul with transposed weights, one layer called twice, one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.projection = nn.Linear(64, 64), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 64))

    def forward(self, x: Any) -> Any:
        x = self.first(torch.addmm(self.first.bias, x, self.first.weight.t()))
        x = x @ self.projection.T
        return x @ self.last.weight.transpose(0, 1) + self.last.bias


class Headless(nn.Module):
    """A product with a weight that is stored as [in, out], and one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d, self.plain = nn.Linear(64, 64, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x: Any) -> Any:
        return (x @ self.conv1d.weight) @ self.plain.weight.T


def _open(folder: Path, module: nn.Module, inputs: Any) -> TorchSession:
    original = compression.original_artifact(folder, module, inputs)
    return TorchEngine().load(original.manifest, original.cache)


@pytest.mark.parametrize(
    ("module", "inputs", "layers"),
    [
        (compression.mlp, compression.PIXELS, ["0", "2", "4"]),
        (compression.conv_net, compression.IMAGES, ["8"]),
        (compression.transformer_block, compression.STATES, ["down", "key", "out", "query", "up", "value"]),
        (compression.tied_language_model, compression.TOKENS, ["body"]),
        (ByHand, compression.PIXELS, ["first"]),
        (Headless, compression.PIXELS, ["plain"]),
    ],
)
def test_layers_come_back_by_name_and_answers_stay(tmp_path: Path, module: Any, inputs: Any, layers: list[str]) -> None:
    """What quantizes `nn.Linear` finds each layer of an exported program, under its own name, and answers as before."""
    torch.manual_seed(0)
    session = _open(tmp_path, module(), inputs)
    rows = tensors.synthetic(session.inputs, size=3, seed=1)
    before, names = session.infer(rows), list(session.module.state_dict())
    assert linears.rebuild(session.module) == layers
    assert list(session.module.state_dict()) == names
    assert sorted(linears.linear_layers(session.module)) == layers
    np.testing.assert_allclose(session.infer(rows)["output"], before["output"], rtol=1e-6, atol=1e-6)


def test_a_module_that_was_not_exported_is_left_alone() -> None:
    """A factory's program has its own layers."""
    module = compression.mlp()
    assert linears.rebuild(module) == []
    assert sorted(linears.linear_layers(module)) == ["0", "2", "4"]


def test_rebuilding_twice_changes_nothing_more(tmp_path: Path) -> None:
    """The second call finds no call to replace."""
    session = _open(tmp_path, compression.mlp(), compression.PIXELS)
    linears.rebuild(session.module)
    assert linears.rebuild(session.module) == []
