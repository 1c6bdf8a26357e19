"""A short training repairs what pruning broke, and the zeros stay zero."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import compression
from unit.test_pruning import accuracy, artifact, prune, rows, train_data, trained_mlp, weights

from weighbridge.engines.manifest import TensorSpec
from weighbridge.registry.recipe import Recovery
from weighbridge.workers.compression import training
from weighbridge.workers.compression.types import BuildFailed, Original

pytestmark = pytest.mark.slow

RECOVER = {"steps": 150, "batch": 64, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> Original:
    return trained_mlp(tmp_path_factory.mktemp("original"), digits)


def test_recovery_brings_back_most_of_what_85_percent_pruning_took(
    original: Original, digits: Any, tmp_path: Path
) -> None:
    """The accuracy returns, each pruned weight is still zero, biases are named as tuned, the loss is noted."""
    broken = prune(original, tmp_path / "broken", "prune-magnitude", sparsity=0.85)
    data = train_data(digits)
    healed = prune(original, tmp_path / "healed", "prune-magnitude", sparsity=0.85, recover=RECOVER, data=data)
    whole, before = accuracy(original, digits), accuracy(artifact(original, broken), digits)
    after = accuracy(artifact(original, healed), digits)
    assert before < whole - 0.15
    assert after > before + 0.7 * (whole - before)
    lost, found = weights(broken)["2.weight"], weights(healed)["2.weight"]
    assert not found[lost == 0].any()
    assert rows(healed)["2.weight"].action == "pruned 85%"
    assert rows(healed)["2.bias"].action == "fine-tuned"
    assert any("150 steps of 64 rows, following labels and the original" in note for note in healed.notes)


def test_the_same_seed_gives_the_same_weights(original: Original, digits: Any, tmp_path: Path) -> None:
    """Two recoveries with one seed are equal bit for bit; with another seed they differ."""
    recover = {"steps": 5, "seed": 1}
    first, again, other = (
        weights(
            prune(
                original, tmp_path / name, "prune-magnitude", recover=recover | {"seed": seed}, data=train_data(digits)
            )
        )["0.weight"]
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_without_labels_it_follows_the_original(original: Original, digits: Any, tmp_path: Path) -> None:
    """Inputs alone are enough to distil from."""
    labelled = train_data(digits)

    def batches(count: int, batch: int) -> Any:
        return ({"pixels": part["pixels"]} for part in labelled.batches(count, batch))

    data = dataclasses.replace(labelled, batches=batches, labelled=False)
    built = prune(original, tmp_path, "prune-magnitude", sparsity=0.8, recover=RECOVER, data=data)
    assert any("following the original's outputs" in note for note in built.notes)
    assert accuracy(artifact(original, built), digits) > accuracy(original, digits) - 0.1


def test_without_a_training_set_it_fails_and_says_what_to_do(original: Original, tmp_path: Path) -> None:
    """Random inputs teach nothing; nothing is pretended."""
    with pytest.raises(BuildFailed, match=r"put train\.safetensors beside the checkpoints"):
        prune(original, tmp_path, "prune-magnitude", recover={"steps": 5})


def test_a_loss_that_explodes_fails_the_variant(original: Original, digits: Any, tmp_path: Path) -> None:
    """The reason names the setting to lower."""
    with pytest.raises(BuildFailed, match=r"lower recover\.learning_rate"):
        prune(
            original,
            tmp_path,
            "prune-magnitude",
            recover={"steps": 50, "learning_rate": 1000.0},
            data=train_data(digits),
        )


def test_skipped_layers_are_not_trained_either(original: Original, digits: Any, tmp_path: Path) -> None:
    """What the recipe leaves alone keeps its bytes."""
    built = prune(original, tmp_path, "prune-magnitude", skip=["4"], recover={"steps": 3}, data=train_data(digits))
    assert {rows(built)[name].action for name in ("4.weight", "4.bias")} == {"kept"}


def test_a_narrower_program_is_tuned_too(original: Original, digits: Any, tmp_path: Path) -> None:
    """Cutting half of the channels and recovering gives a small program that reads digits."""
    from weighbridge.workers.compression import channels

    wish = {"sparsity": 0.5, "recover": RECOVER}
    built = channels.build(compression.order(original, tmp_path, "prune-channels", data=train_data(digits), **wish))
    assert weights(built)["2.weight"].shape == (64, 64)
    assert built.promised_ratio < 0.45
    assert accuracy(artifact(original, built), digits) > accuracy(original, digits) - 0.07


def test_language_is_taught_by_the_next_token(tmp_path: Path) -> None:
    """Without labels the tokens themselves are the lesson; tied weights stay one tensor."""
    from weighbridge.workers.compression.types import Data

    original = compression.original_artifact(
        tmp_path / "original", compression.tied_language_model(), compression.TOKENS, task="language"
    )

    def batches(count: int, batch: int) -> Any:
        rng = np.random.default_rng(0)
        return ({"tokens": rng.integers(0, 100, (batch, 6))} for _ in range(0, count, batch))

    built = prune(original, tmp_path / "built", "prune-magnitude", recover={"steps": 10}, data=Data("train", batches))
    assert rows(built)["embedding.weight"].action == "fine-tuned"
    assert "lm_head.weight" not in weights(built)


def test_int8_qat_trains_and_then_stores_int8(original: Original, digits: Any, tmp_path: Path) -> None:
    """The artifact is int8-dynamic's: a quarter of the weights' bytes, loadable, as good as the original."""
    from weighbridge.workers.compression import qat

    recover = {"steps": 60, "learning_rate": 1e-3}
    built = qat.build(
        compression.order(original, tmp_path, "int8-qat", data=train_data(digits), recover=recover, skip=["4"])
    )
    said = rows(built)
    assert said["2.weight"].action == "int8, a scale a row"
    assert said["2.weight"].bytes_out < said["2.weight"].bytes_in / 3
    assert said["2.bias"].action == "fine-tuned"
    assert said["4.weight"].action == "kept"
    assert built.encoding is not None
    assert accuracy(artifact(original, built), digits) > accuracy(original, digits) - 0.02


def test_a_lowered_batch_still_takes_every_step(original: Original, digits: Any, tmp_path: Path) -> None:
    """After an out-of-memory the stage gives smaller batches; the training goes on with them to its last step."""
    from weighbridge.workers.compression.data import Limited

    seen: list[float] = []
    wish = {"recover": {"steps": 30, "batch": 64}}
    limited = Limited(train_data(digits), 8).data
    order = compression.order(original, tmp_path, "prune-magnitude", data=limited, **wish)
    from weighbridge.workers.compression import pruning

    pruning.build(dataclasses.replace(order, progress=seen.append))
    assert len(seen) == 30
    assert seen[-1] == 1


class Heads(torch.nn.Module):
    """A head of one logit and one of three numbers, in the order that is asked."""

    def __init__(self, first: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logit, self.price, self.first = torch.nn.Linear(4, 1), torch.nn.Linear(4, 3), first

    def forward(self, x: torch.Tensor) -> Any:
        both = {"logit": self.logit(x), "price": 100 * self.price(x)}
        return tuple(both[name] for name in sorted(both, key=lambda name: name != self.first))


@pytest.mark.parametrize("first", ["logit", "price"])
def test_the_labels_are_of_the_output_that_is_read_and_the_others_are_followed(first: str) -> None:
    """One logit a row learns two classes; a head that no label is for goes back to the original's too."""
    teacher = Heads(first).eval().requires_grad_(False)
    student = Heads(first)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    x = np.random.default_rng(0).standard_normal((512, 4)).astype(np.float32)
    labels = (teacher(torch.from_numpy(x))[first != "logit"] > 0).long().numpy()[:, 0]
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))
    wishes = Recovery(steps=300, learning_rate=0.02, weight_decay=0)
    lesson = training.Lesson(wishes, "classification", (spec,), read=int(first != "logit"))
    trained = training.trainable(student, frozenset())
    passes = training.endless(lambda _: iter([{"x": x, "labels": labels}]))
    before, after = training.train(student, trained, teacher, lesson, passes, lambda _: None)
    assert after < 0.5 * before
    seen, wanted = (torch.cat(model(torch.from_numpy(x)), 1) for model in (student.eval(), teacher))
    column = 0 if first == "logit" else 3
    assert ((seen[:, column] > 0).long().numpy() == labels).mean() > 0.97
    prices = [at for at in range(4) if at != column]
    assert (seen[:, prices] - wanted[:, prices]).std() < 0.1 * wanted[:, prices].std()
