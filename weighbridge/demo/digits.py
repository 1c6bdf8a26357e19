"""The data and the models: scikit-learn's 1,797 handwritten digits (8 × 8), a small MLP and a small CNN."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn

INPUT, OUTPUT = "pixels", "logits"
TEMPLATE, CNN_TEMPLATE = "digits-mlp", "digits-cnn"
FACTORY = "weighbridge.demo.digits:build"
CNN_FACTORY = "weighbridge.demo.digits:build_cnn"


def build(hidden: int = 64) -> nn.Module:
    """The program: pixels [n, 64] in 0…1 → logits [n, 10]."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def build_cnn() -> nn.Module:
    """The same contract with three convolutions."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


@dataclass(frozen=True)
class Split:
    """Pixels [n, 64] float32 in 0…1, and labels [n] int64."""

    pixels: NDArray[np.float32]
    labels: NDArray[np.int64]


@cache
def load() -> tuple[Split, Split, Split]:
    """Train, evaluation and held-out digits: 997, 400, 400. The hosts are asked for the last at the end."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = (data.data[order] / 16).astype(np.float32)
    labels = data.target[order].astype(np.int64)
    parts = (slice(0, 997), slice(997, 1397), slice(1397, None))
    train, evaluation, held_out = (Split(pixels[part], labels[part]) for part in parts)
    return train, evaluation, held_out


def write_evaluation_set(path: Path) -> None:
    """`eval.safetensors`: the inputs by name, and `labels`."""
    _write(path, load()[1])


def write_training_set(path: Path) -> None:
    """`train.safetensors`, in the same form: what variants are calibrated on."""
    _write(path, load()[0])


def _write(path: Path, data: Split) -> None:
    save_file({INPUT: data.pixels, "labels": data.labels}, path)


def train(
    steps: int, *, seed: int, module: nn.Module | None = None, rank: int = 0, ranks: int = 1, rate: float = 0.01
) -> nn.Module:
    """Fit for some steps of Adam on this rank's share of the training digits."""
    data, _, _ = load()
    torch.manual_seed(seed)
    module = module or build()
    pixels, labels = (torch.from_numpy(array[rank::ranks]) for array in (data.pixels, data.labels))
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    for step in range(steps):
        start = step * 128 % len(pixels)
        loss = nn.functional.cross_entropy(module(pixels[start : start + 128]), labels[start : start + 128])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module


def accuracy(module: nn.Module, data: Split) -> float:
    """The share of right digits."""
    with torch.inference_mode():
        predicted = module(torch.from_numpy(data.pixels)).argmax(1).numpy()
    return float((predicted == data.labels).mean())
