"""The ranks of a real torchrun share each batch of the training set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.test_pruning import prune, train_data, trained_mlp, weights

from weighbridge.workers.compression.types import BuildFailed, Original

RECOVER = {"steps": 6, "batch": 64, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> Original:
    return trained_mlp(tmp_path_factory.mktemp("original"), digits)


@pytest.mark.slow
def test_two_ranks_train_what_one_would(original: Original, digits: Any, tmp_path: Path) -> None:
    """Two processes average their gradients: what they train obeys the masks and comes close to what one trains."""
    made = {
        ranks: prune(
            original,
            tmp_path / str(ranks),
            "prune-magnitude",
            sparsity=0.8,
            recover=RECOVER | {"ranks": ranks},
            data=train_data(digits),
        )
        for ranks in (1, 2)
    }
    one, two = (weights(built)["2.weight"] for built in made.values())
    assert np.mean(two == 0) == pytest.approx(0.8, abs=0.01)
    assert np.abs(two - one).mean() < 1e-4
    assert any("on 2 ranks" in note for note in made[2].notes)


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_variant_with_its_reason(original: Original, digits: Any, tmp_path: Path) -> None:
    """The child's own words reach the report."""
    data = train_data(digits)

    def batches(rows: int, batch: int) -> Any:
        for part in data.batches(rows, batch):
            yield {**part, "labels": part["labels"] + 1000}

    with pytest.raises(BuildFailed, match=r"a rank of torchrun failed: .*out of bounds"):
        prune(
            original,
            tmp_path,
            "prune-magnitude",
            recover=RECOVER | {"ranks": 2},
            data=dataclasses.replace(data, batches=batches),
        )
