"""Weights become zero where they matter least; everything else of the artifact stays what it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import compression

from weighbridge.engines.load import load
from weighbridge.engines.protocols import Arrays
from weighbridge.workers.compression.types import Built, Data, NotApplicable, Order, Original


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> Original:
    """The MLP of three layers, trained on digits to more than 90%."""
    return trained_mlp(tmp_path_factory.mktemp("original"), digits)


def trained_mlp(folder: Path, digits: Any) -> Original:
    import torch

    module = compression.mlp(128)
    pixels, labels = (torch.from_numpy(value[:-400]) for value in digits._data)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(pixels), labels).backward()
        optimizer.step()
    return compression.original_artifact(folder, module.requires_grad_(False), compression.PIXELS)


def train_data(digits: Any) -> Data:
    pixels, labels = (value[:-400] for value in digits._data)

    def batches(rows: int, batch: int) -> Iterator[Arrays]:
        for start in range(0, min(rows, len(labels)), batch):
            part = slice(start, min(start + batch, rows))
            yield {"pixels": pixels[part], "labels": labels[part]}

    return Data("train", batches, labelled=True)


def artifact(original: Original, built: Built) -> Original:
    """What the stage would make of it: the original's manifest with the variant's files, program and binding."""
    import dataclasses

    from blake3 import blake3

    from weighbridge.engines.manifest import ArtifactFile

    paths = {blake3(local.read_bytes()).hexdigest(): local for local in built.files.values()}
    files = tuple(
        ArtifactFile(path=path, size=local.stat().st_size, digest=blake3(local.read_bytes()).hexdigest())
        for path, local in built.files.items()
    )
    changes: dict[str, Any] = {"files": files, "encoding": built.encoding, "engine": built.engine}
    if built.program is not None:
        changes |= {"program": built.program, "binding": built.binding}
        paths[built.program.digest] = built.program_file
    manifest = original.manifest.model_copy(update=changes)
    return dataclasses.replace(
        original, manifest=manifest, cache=lambda digest: paths.get(digest) or original.cache(digest)
    )


def accuracy(original: Original, digits: Any) -> float:
    session = load(original.manifest, original.cache)
    answers = session.infer({"pixels": digits.held_out})["output"].argmax(axis=1)
    return float(np.mean(answers == digits.held_out_labels))


def weights(built: Built) -> dict[str, Any]:
    from safetensors.numpy import load_file

    (path,) = built.files.values()
    return load_file(path)


def rows(built: Built) -> dict[str, Any]:
    return {row.name: row for row in built.tensors}


def prune(original: Original, folder: Path, method: str, **wish: Any) -> Built:
    from weighbridge.workers.compression import pruning

    return pruning.build(compression.order(original, folder, method, **wish))


@pytest.mark.parametrize("method", ["prune-magnitude", "prune-wanda"])
def test_half_the_weights_are_zero_and_the_digits_are_still_read(
    original: Original, digits: Any, tmp_path: Path, method: str
) -> None:
    """At 50% every layer has half its weights at zero, biases stay, and the accuracy hardly falls."""
    built = prune(original, tmp_path, method, sparsity=0.5, data=train_data(digits))
    now = weights(built)
    assert all(np.mean(now[f"{layer}.weight"] == 0) == 0.5 for layer in ("0", "2", "4"))
    said = rows(built)
    assert said["2.weight"].action == "pruned 50%"
    assert said["2.weight"].sqnr > 3
    assert said["2.bias"].action == "kept"
    assert said.keys() == now.keys()
    assert built.promised_ratio == 1
    assert accuracy(artifact(original, built), digits) > accuracy(original, digits) - 0.1


def test_wanda_removes_what_never_sees_a_signal(original: Original, digits: Any, tmp_path: Path) -> None:
    """Pixels that are dark in every digit make their weights worthless, whatever their magnitude."""
    built = prune(original, tmp_path, "prune-wanda", sparsity=0.5, data=train_data(digits), calibration_rows=1397)
    dark = (train_data(digits).batches(1397, 1397).__next__()["pixels"] == 0).all(axis=0)
    assert dark.any()
    assert not weights(built)["0.weight"][:, dark].any()
    assert built.calibration == "train"
    assert "calibrated on 1397 rows of train inputs" in built.notes


def test_95_percent_destroys_and_says_so(original: Original, digits: Any, tmp_path: Path) -> None:
    """The gate's bad example: built and reported as what it is."""
    built = prune(original, tmp_path, "prune-magnitude", sparsity=0.95)
    assert rows(built)["2.weight"].action == "pruned 95%"
    assert accuracy(artifact(original, built), digits) < 0.8


def test_layers_that_the_recipe_skips_stay(original: Original, tmp_path: Path) -> None:
    """The named layer keeps its bytes, and the report names the pattern."""
    built = prune(original, tmp_path, "prune-magnitude", skip=["4"])
    assert rows(built)["4.weight"].reason == "skipped by 4"
    assert np.count_nonzero(weights(built)["4.weight"]) == 1280


def test_convolutions_are_pruned_with_their_own_input_channels(tmp_path: Path) -> None:
    """A convolution's kernels are pruned row by row; batch norms stay."""
    original = compression.original_artifact(tmp_path / "original", compression.conv_net(), compression.IMAGES)
    built = prune(original, tmp_path / "built", "prune-wanda", sparsity=0.75)
    kernels = weights(built)["3.weight"].reshape(32, -1)
    assert (np.count_nonzero(kernels, axis=1) == kernels.shape[1] // 4).all()
    assert rows(built)["1.running_var"].action == "kept"
    assert built.calibration == "synthetic"


def test_a_tied_embedding_is_left_alone(tmp_path: Path) -> None:
    """What is looked up is not pruned, though a linear layer uses it too."""
    original = compression.original_artifact(
        tmp_path / "original", compression.tied_language_model(), compression.TOKENS, task="language"
    )
    built = prune(original, tmp_path / "built", "prune-magnitude")
    assert rows(built)["body.weight"].action == "pruned 50%"
    assert rows(built)["embedding.weight"].reason == "an embedding too"


def test_2_4_asks_for_cuda(original: Original, tmp_path: Path) -> None:
    """Its kernels are CUDA's: elsewhere the variant is not applicable, and the device is named."""
    with pytest.raises(NotApplicable, match="this worker's device is cpu"):
        prune(original, tmp_path, "sparse-2-4")


def test_2_4_leaves_two_of_each_four(original: Original, digits: Any, tmp_path: Path) -> None:
    """Along the inputs, in 16 bits; a layer of a shape that the kernels do not take stays dense, by name."""
    from weighbridge.workers.compression import pruning

    order: Order = compression.order(original, tmp_path, "sparse-2-4", data=train_data(digits))
    built = pruning.prune(order)
    from safetensors.torch import load_file

    now = load_file(built.files["model.safetensors"])
    assert {str(value.dtype) for value in now.values()} == {"torch.bfloat16"}
    assert ((now["2.weight"].reshape(-1, 4) != 0).sum(dim=1) == 2).all()
    assert rows(built)["4.weight"].reason.startswith("10×128 is not made of 32×64")
    assert built.promised_ratio == pytest.approx(0.5)
    assert accuracy(artifact(original, built), digits) > 0.7
