"""Hidden channels are cut out of pairs of layers: a narrower program, smaller tensors, the same inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import compression
from unit.test_pruning import accuracy, artifact, rows, train_data, trained_mlp, weights

from weighbridge.engines.load import load
from weighbridge.engines.manifest import TensorSpec
from weighbridge.workers.compression.types import Built, NotApplicable, Original

pytestmark = pytest.mark.slow


def cut(original: Original, folder: Path, **wish: Any) -> Built:
    from weighbridge.workers.compression import channels

    return channels.build(compression.order(original, folder, "prune-channels", **wish))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> Original:
    return trained_mlp(tmp_path_factory.mktemp("original"), digits)


def test_half_of_the_hidden_channels_go_and_the_artifact_loads_and_answers(
    original: Original, digits: Any, tmp_path: Path
) -> None:
    """The artifact loads with its own template, takes any batch, is as small as promised, and beats chance."""
    built = cut(original, tmp_path, sparsity=0.5, data=train_data(digits))
    now = weights(built)
    assert now["0.weight"].shape == (64, 64)
    assert now["2.weight"].shape == (64, 64)
    assert now["4.weight"].shape == (10, 64)
    said = rows(built)
    assert (said["2.weight"].action, said["2.weight"].reason) == ("cut", "128×128 → 64×64")
    assert said["4.bias"].action == "kept"
    size = sum(value.nbytes for value in now.values())
    assert size == pytest.approx(built.promised_ratio * sum(row.bytes_in for row in built.tensors))
    assert built.promised_ratio < 0.45
    assert built.program is not None
    assert built.program.name == "Sequential+prune-channels"
    assert accuracy(artifact(original, built), digits) > 0.4


def test_the_cut_channels_are_those_that_matter_least(tmp_path: Path) -> None:
    """Channels that add nothing are cut first: the outputs stay what they were."""
    import torch

    module = compression.mlp(64)
    with torch.no_grad():
        module[2].weight[:, ::2] = 0
        module[4].weight[:, 1::2] = 0
    original = compression.original_artifact(tmp_path / "original", module, compression.PIXELS)
    built = cut(original, tmp_path / "built", sparsity=0.5)
    pixels = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    before, after = (
        load(one.manifest, one.cache).infer({"pixels": pixels})["output"]
        for one in (original, artifact(original, built))
    )
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_convolutions_with_batch_norms_are_cut_and_feed_a_linear_layer(tmp_path: Path) -> None:
    """The norms' numbers go with their channels; a flattened image's columns go together."""
    from torch import nn

    module = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        *(nn.Linear(256, 32), nn.GELU(), nn.Linear(32, 10)),
    ).eval()
    original = compression.original_artifact(tmp_path / "original", module, compression.IMAGES)
    built = cut(original, tmp_path / "built", sparsity=0.75)
    now = weights(built)
    assert now["0.weight"].shape == (4, 3, 3, 3)
    assert now["1.running_var"].shape == (4,)
    assert now["5.weight"].shape == (8, 64)
    session = load(artifact(original, built).manifest, artifact(original, built).cache)
    assert session.infer({"images": np.zeros((3, 3, 16, 16), np.float32)})["output"].shape == (3, 10)


def test_what_a_residual_joins_is_left_with_the_reason(tmp_path: Path) -> None:
    """Only the block's inner layer is cut; attention's layers stay, and the report says why."""
    original = compression.original_artifact(
        tmp_path / "original", compression.transformer_block(), compression.STATES, task="embedding"
    )
    built = cut(original, tmp_path / "built", sparsity=0.5)
    said = rows(built)
    assert said["up.weight"].reason == "256×64 → 128×64"
    assert said["down.weight"].reason == "64×256 → 64×128"
    assert "may mix channels" in said["query.weight"].reason
    assert "mixes it with something else" in said["out.weight"].reason
    session = load(artifact(original, built).manifest, artifact(original, built).cache)
    assert session.infer({"states": np.zeros((2, 5, 64), np.float32)})["output"].shape == (2, 5, 64)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_program_without_a_pair_is_not_applicable(tmp_path: Path, groups: int) -> None:
    """One layer gives the output, a grouped convolution cannot be cut: the reasons are named."""
    from torch import nn

    module = nn.Sequential(nn.Conv2d(4, 8, 1, groups=groups), nn.ReLU())
    if groups == 2:
        module.append(nn.Conv2d(8, 2, 1))
    inputs = (TensorSpec(name="images", datatype="FP32", shape=(-1, 4, 2, 2)),)
    original = compression.original_artifact(tmp_path / "original", module.eval(), inputs)
    reason = "0.weight: its convolution is grouped" if groups == 2 else "0.weight: it gives an output"
    with pytest.raises(NotApplicable, match=reason):
        cut(original, tmp_path / "built")


def test_layers_that_the_recipe_skips_stay_whole(original: Original, tmp_path: Path) -> None:
    """A skipped layer is neither narrowed nor read by less."""
    built = cut(original, tmp_path, skip=["4"])
    assert weights(built)["2.weight"].shape == (128, 64)
    assert rows(built)["2.weight"].reason == "128×128 → 128×64"
    assert rows(built)["4.weight"].action == "kept"
