"""A variant against its original: each task, what fails closed, and memory that is short."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.compression import PIXELS, TOKENS, blobs_in, mlp, original_artifact, tied_language_model
from safetensors.numpy import save
from safetensors.torch import load_file
from safetensors.torch import save as save_torch

from weighbridge.engines.load import load
from weighbridge.engines.manifest import ArtifactFile, Manifest, TensorSpec
from weighbridge.registry.recipe import Gate, Quality, Task
from weighbridge.workers.evaluate import Champion, EvaluateTask, evaluate
from weighbridge.workers.evaluation import compare as module
from weighbridge.workers.evaluation import datasets, tasks, verdicts
from weighbridge.workers.evaluation.compare import CompareTask, compare
from weighbridge.workers.outcome import Outcome

ROWS = 300


@dataclass
class Scales:
    """One original, its variants by a change of its weights, and sets that its own answers label."""

    folder: Path
    original: Manifest
    cache: Callable[[str], Path]
    task: Task

    def variant(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> str:
        (file,) = self.original.files
        weights = {name: change(name, value) for name, value in load_file(self.cache(file.digest)).items()}
        blob = blobs_in(self.folder).put_bytes(save_torch(weights))
        made = ArtifactFile(path=file.path, size=blob.size, digest=blob.digest)
        return self.add(self.original.model_copy(update={"files": (made,)}).canonical())

    def add(self, data: bytes) -> str:
        return blobs_in(self.folder).put_bytes(data).digest

    def answers(self, **inputs: Any) -> Any:
        return load(self.original, self.cache).infer(inputs)["output"]

    def evaluate(self, dataset: str | None, *gates: Gate) -> Outcome:
        task = EvaluateTask(self.original.digest, dataset, gates, task=self.task)
        return evaluate(task, cache=self.cache)

    def compare(self, artifact: str, dataset: str | None = None, **quality: Any) -> Outcome:
        asked = Quality(**quality)
        return compare(CompareTask(artifact, self.original.digest, dataset, self.task, asked), cache=self.cache)


def _scales(folder: Path, module: Any, inputs: Any, task: Task) -> Scales:
    original = original_artifact(folder, module, inputs, task=task)
    return Scales(folder, original.manifest, original.cache, task)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Scales:
    return _scales(tmp_path_factory.mktemp("classes"), mlp(32), PIXELS, "classification")


@pytest.fixture(scope="module")
def vectors(classes: Scales) -> Scales:
    """The same program, its ten numbers read as an embedding."""
    return Scales(classes.folder, classes.original, classes.cache, "embedding")


@pytest.fixture(scope="module")
def numbers(classes: Scales) -> Scales:
    """The same program, its ten numbers read as a regression."""
    return Scales(classes.folder, classes.original, classes.cache, "regression")


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Scales:
    return _scales(tmp_path_factory.mktemp("language"), tied_language_model(), TOKENS, "language")


PIXEL_ROWS = np.random.default_rng(0).standard_normal((ROWS, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def labelled(classes: Scales) -> str:
    """The original is right on nine rows of ten."""
    labels = classes.answers(pixels=PIXEL_ROWS).argmax(1)
    labels[::10] = (labels[::10] + 1) % 10
    return classes.add(save({"pixels": PIXEL_ROWS, "labels": labels}))


def same(name: str, value: torch.Tensor) -> torch.Tensor:
    return value


def cast(name: str, value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16)


def noisy(name: str, value: torch.Tensor) -> torch.Tensor:
    return value + value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))


def metrics(outcome: Outcome) -> dict[str, float]:
    return {one.name: one.value for one in outcome.metrics if not one.slice.startswith("class=")}


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_an_original_keeps_all_of_itself(classes: Scales, labelled: str, metric: str) -> None:
    """100%, no divergence, every answer the same."""
    outcome = classes.compare(classes.original.digest, labelled, keep=1.0, metric=metric, min_top1=1, max_kl_p99=0)
    assert outcome.verdict == "passed"
    seen = metrics(outcome)
    assert (seen["kept"], seen["kept_bound"], seen["kl_mean"], seen["top1"]) == (1, 1, 0, 1)
    assert seen["accuracy"] == pytest.approx(0.9)
    assert outcome.facts["drift_on"] == "eval"
    assert (outcome.facts["rows"], outcome.facts["evidence"]) == (ROWS, {"evaluated": True})


def test_noise_fails_with_the_numbers(classes: Scales, labelled: str) -> None:
    """Every gate that stands has a row with what was seen and what was asked; each class has its own numbers."""
    outcome = classes.compare(classes.variant(noisy), labelled, min_cosine=0.999)
    assert outcome.verdict == "rejected"
    assert outcome.reason.startswith("keeps ")
    assert "% of accuracy 0.9 (95% bound " in outcome.reason
    assert "needs 99%; cosine 0." in outcome.reason
    assert [(one.gate, one.verdict) for one in outcome.gates] == [
        ("quality.keep", "failed"),
        ("quality.min_cosine", "failed"),
    ]
    assert outcome.gates[0].observed == outcome.facts["kept_bound"] < outcome.facts["kept"] < 0.99
    assert any(one.slice == "class=3" for one in outcome.metrics)


def test_without_a_set_drift_decides(classes: Scales) -> None:
    """On golden and synthetic inputs, by the task's defaults or the recipe's bounds, and recorded as such."""
    good, bad = classes.compare(classes.variant(cast)), classes.compare(classes.variant(noisy))
    assert good.verdict == "passed"
    assert (good.facts["drift_on"], good.facts["rows"]) == ("golden+synthetic", 260)
    assert good.facts["evidence"] == {"evaluated": False}
    assert {(one.slice, one.dataset_digest) for one in good.metrics} == {("synthetic", "")}
    assert [one.gate for one in good.gates] == ["quality.min_top1", "quality.max_kl_mean"]
    assert bad.verdict == "rejected"
    assert "top1 0." in bad.reason
    assert classes.compare(classes.variant(noisy), min_top1=0, max_kl_mean=1e9).verdict == "passed"


def test_a_regression(numbers: Scales) -> None:
    """mse is 0.25 by hand and agrees with R²; a variant with half again the error keeps less than half of it."""
    wanted = numbers.answers(pixels=PIXEL_ROWS) + np.float32(0.5)
    dataset = numbers.add(save({"pixels": PIXEL_ROWS, "labels": wanted}))
    seen = metrics(own := numbers.evaluate(dataset, Gate(metric="mse", max=0.26)))
    assert own.verdict == "passed"
    assert (seen["mse"], seen["mae"]) == (pytest.approx(0.25, rel=1e-5), pytest.approx(0.5, rel=1e-5))
    assert seen["r2"] == pytest.approx(1 - (0.25 / wanted.astype(np.float64).var(0)).mean(), rel=1e-4)
    assert numbers.compare(numbers.variant(cast), dataset, keep=0.98).verdict == "passed"
    shifted = numbers.variant(lambda name, value: value - 0.25 if name == "4.bias" else value)
    outcome = numbers.compare(shifted, dataset)
    assert outcome.facts["kept"] == pytest.approx((0.5 / 0.75) ** 2, rel=1e-4)
    assert outcome.verdict == "rejected"
    assert metrics(outcome)["max_abs"] == pytest.approx(0.25, rel=1e-4)
    assert "no share of it" in numbers.compare(shifted, dataset, metric="r2").reason


def test_an_error_drops_by_growing(numbers: Scales) -> None:
    """`max_drop` of an error is how much worse it may be than the champion's."""
    wanted = numbers.answers(pixels=PIXEL_ROWS) + np.float32(0.5)
    dataset = numbers.add(save({"pixels": PIXEL_ROWS, "labels": wanted}))
    gate = Gate(metric="mse", max_drop=0.01)

    def beside(known: float, *more: Gate) -> Outcome:
        champion = Champion(7, "0" * 64, {"mse": known})
        task = EvaluateTask(numbers.original.digest, dataset, (gate, *more), champion, task="regression")
        return evaluate(task, cache=numbers.cache)

    assert beside(0.3).verdict == beside(0.245).verdict == "passed"
    assert beside(0.2).reason == "mse 0.25 is 0.05 above champion 7's 0.2 (max_drop 0.01)"


def test_a_gate_of_a_metric_that_the_task_does_not_have(numbers: Scales) -> None:
    """It is not applicable, with and without a set, so that one policy is for every task; `required` fails."""
    dataset = numbers.add(save({"pixels": PIXEL_ROWS, "labels": numbers.answers(pixels=PIXEL_ROWS)}))

    def judged(*gates: Gate, dataset: str | None = dataset, champion: Champion | None = None) -> Outcome:
        return evaluate(
            EvaluateTask(numbers.original.digest, dataset, gates, champion, task="regression"), cache=numbers.cache
        )

    foreign = Gate(metric="accuracy", min=0.8, max_drop=0.1)
    said = "accuracy is no metric of task: regression (mse, mae, r2 are), and the gate is not `required`"
    outcome = judged(foreign, Gate(metric="mse", max=0.1))
    assert outcome.verdict == "passed"
    assert [(one.gate, one.verdict) for one in outcome.gates] == [
        ("accuracy.min", "not_applicable"), ("accuracy.max_drop", "not_applicable"), ("mse.max", "passed")
    ]  # fmt: skip
    assert outcome.gates[0].reason == said
    assert judged(foreign, champion=Champion(7, "0" * 64)).verdict == "passed"  # nobody is evaluated again for it
    unmeasured = judged(foreign, dataset=None)
    assert (unmeasured.verdict, unmeasured.gates[0].reason) == ("not_applicable", said)
    required = foreign.model_copy(update={"required": True})
    assert judged(required).reason.startswith("accuracy is not measured (mse, mae, r2 are)")
    assert judged(required, dataset=None).verdict == "rejected"
    assert judged(foreign, Gate(metric="mse", max=0.1), dataset=None).verdict == "rejected"
    assert judged(Gate(metric="perplexity", max=2)).verdict == "passed"


def test_a_champion_that_has_no_such_number_decides_nothing(numbers: Scales) -> None:
    """As none at all; one that cannot be evaluated fails the gate."""
    known = verdicts.Compared(7, {"mse": 0.1})
    (result,) = verdicts.judge(Gate(metric="mae", max_drop=0.1), "regression", {"mae": 0.2}, known)
    assert (result.verdict, result.reason) == (
        "not_applicable", "mae: champion 7 has none on this set to compare with (max_drop 0.1)"
    )  # fmt: skip
    broken = verdicts.Compared(7, reason="champion 7 cannot be evaluated on this set: no such blob")
    assert verdicts.judge(Gate(metric="mae", max_drop=0.1), "regression", {"mae": 0.2}, broken)[0].verdict == "failed"


@pytest.mark.parametrize("width", [(), (1,), (3,), (2, 2)])
def test_regressions_of_any_shape_equal_scikit_learn(width: tuple[int, ...]) -> None:
    """Vectors, columns, matrices and more, in batches of one and of many."""
    reference = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    labels = rng.standard_normal((40, *width))
    output = labels + 0.3 * rng.standard_normal(labels.shape)
    meter = tasks.meter("regression", TensorSpec(name="y", datatype="FP32", shape=(-1, *width)), 40)
    for part in (slice(0, 1), slice(1, 30), slice(30, 40)):
        meter.add(labels[part], output[part])
    flat = labels.reshape(40, -1), output.reshape(40, -1)
    names = {"mse": "mean_squared_error", "mae": "mean_absolute_error", "r2": "r2_score"}
    assert meter.scores() == pytest.approx({name: getattr(reference, long)(*flat) for name, long in names.items()})


@pytest.mark.slow
def test_a_comparison_streams(classes: Scales) -> None:
    """Sixty thousand rows, 15 MB, are compared in less: what is kept of a row is its scores."""
    many = np.random.default_rng(5).standard_normal((60_000, 64)).astype(np.float32)
    dataset = classes.add(save({"pixels": many, "labels": np.arange(len(many)) % 10}))
    del many
    tracemalloc.start()
    outcome = classes.compare(classes.original.digest, dataset, keep=0.5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcome.verdict == "passed", outcome.reason
    assert peak < 12 << 20


def test_a_language(language: Scales) -> None:
    """Perplexity over the labels that count equals torchmetrics'; without labels the next tokens are the labels."""
    from torchmetrics.functional.text import perplexity

    tokens = np.random.default_rng(1).integers(0, 100, (40, 9))
    labels = np.roll(tokens, -1, 1)
    labels[:, -1] = -100
    wanted = perplexity(
        torch.from_numpy(language.answers(tokens=tokens)).double(), torch.from_numpy(labels), ignore_index=-100
    )
    bare = language.add(save({"tokens": tokens}))
    for dataset in (bare, language.add(save({"tokens": tokens, "labels": labels}))):
        assert metrics(language.evaluate(dataset))["perplexity"] == pytest.approx(float(wanted))
    outcome = language.compare(language.variant(cast), bare)
    assert outcome.verdict == "passed"
    assert metrics(outcome)["kl_mean"] < 1e-3
    noise = language.compare(language.variant(noisy), bare, max_kl_mean=0.01)
    assert (noise.verdict, noise.gates[1].verdict) == ("rejected", "failed")


def test_an_embedding(vectors: Scales) -> None:
    """Needs no labels; what is kept is the cosine, or the nearest neighbours; with classes also their accuracy."""
    bare = vectors.add(save({"pixels": PIXEL_ROWS}))
    assert vectors.evaluate(bare).verdict == "not_applicable"
    assert vectors.evaluate(bare, Gate(metric="cosine", min=0.9)).verdict == "rejected"
    good, bad = vectors.compare(vectors.variant(cast), bare), vectors.compare(vectors.variant(noisy), bare)
    assert (good.verdict, bad.verdict) == ("passed", "rejected")
    assert good.facts["kept"] == pytest.approx(metrics(good)["cosine"], abs=1e-9)
    assert good.facts["kept"] > 0.999
    assert metrics(bad)["retrieval_agreement"] < 0.9
    assert vectors.compare(vectors.variant(cast), bare, metric="retrieval_agreement", keep=0.9).verdict == "passed"
    assert "needs classes" in vectors.compare(vectors.variant(cast), bare, metric="accuracy").reason
    twins = np.repeat(PIXEL_ROWS[:50], 2, 0) + np.float32(1e-3) * PIXEL_ROWS[:100]
    paired = vectors.add(save({"pixels": twins, "labels": np.repeat(np.arange(50), 2)}))
    assert metrics(vectors.evaluate(paired, Gate(metric="accuracy", min=0.99)))["accuracy"] == 1
    assert vectors.compare(vectors.variant(same), paired, metric="accuracy", keep=1.0).verdict == "passed"


@pytest.mark.parametrize(
    ("tensors", "rule"),
    [
        ({"pixels": PIXEL_ROWS}, "eval.safetensors: labels is missing"),
        ({"image": PIXEL_ROWS, "labels": np.zeros(ROWS, np.int64)}, "eval.safetensors: pixels is missing"),
        ({"pixels": PIXEL_ROWS[:, :5].copy(), "labels": np.arange(ROWS) % 10}, "eval.safetensors: input pixels"),
        ({"pixels": PIXEL_ROWS, "labels": np.zeros(ROWS, np.float32)}, "labels must be a vector of integers"),
    ],
)
def test_a_set_that_does_not_fit_rejects(classes: Scales, tensors: dict[str, Any], rule: str) -> None:
    """It names itself and the rule, and nothing counts as evaluated."""
    outcome = classes.compare(classes.original.digest, classes.add(save(tensors)))
    assert outcome.verdict == "rejected"
    assert rule in outcome.reason
    assert outcome.facts["evidence"] == {"evaluated": False}


def test_what_cannot_be_measured_does_not_pass(classes: Scales, labelled: str) -> None:
    """A metric of another task; NaN, by the name of who gave it."""
    outcome = classes.compare(classes.original.digest, labelled, metric="mse")
    assert outcome.reason == "classification has no mse (accuracy, precision, recall, f1)"
    broken = classes.variant(lambda name, value: value * torch.nan)
    for dataset in (labelled, None):
        outcome = classes.compare(broken, dataset)
        assert (outcome.verdict, "the variant's output output holds NaN" in outcome.reason) == ("rejected", True)


def _short(most: int, sessions: int) -> Callable[..., Any]:
    """The real engine on a device that holds so many sessions and answers so many rows at once."""
    held: list[int] = []

    def opened(*args: Any, **kwargs: Any) -> Any:
        if len(held) == sessions:
            raise torch.OutOfMemoryError("device full")
        session = load(*args, **kwargs)
        infer, close = session.infer, session.close
        held.append(1)

        def few(inputs: Any) -> Any:
            if len(inputs["pixels"]) > most:
                raise torch.OutOfMemoryError("device full")
            return infer(inputs)

        def leave() -> None:
            if session.infer is few:
                held.pop()
                session.infer = infer
            close()

        session.infer, session.close = few, leave
        return session

    return opened


@pytest.mark.parametrize(("sessions", "said"), [(2, "batch lowered to 75"), (1, "one after the other")])
def test_short_memory_changes_nothing_but_the_notes(
    classes: Scales, labelled: str, monkeypatch: pytest.MonkeyPatch, sessions: int, said: str
) -> None:
    """Fewer rows at once, or one model after the other, give the same numbers and say so."""
    variant = classes.variant(cast)
    roomy = classes.compare(variant, labelled)
    monkeypatch.setattr(module, "load", _short(100, sessions))
    monkeypatch.setattr(datasets, "BATCH_ROWS", 150)
    tight = classes.compare(variant, labelled)
    assert metrics(tight) == pytest.approx(metrics(roomy), rel=1e-6)
    assert any(said in note for note in tight.facts["notes"])
    monkeypatch.setattr(module, "load", _short(0, 2))
    with pytest.raises(MemoryError):
        classes.compare(variant, labelled)


def test_a_batch_is_small_where_outputs_are_large(language: Scales, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary for each token counts: memory is a batch, not the set."""
    tokens = np.zeros((64, 50), np.int64)
    path = language.cache(language.add(save({"tokens": tokens})))
    monkeypatch.setattr(datasets, "OUTPUT_BYTES", 8 * 50 * 100 * 3)
    with datasets.open_dataset(path, language.original.inputs, "language") as data:
        sizes = []
        for inputs, _ in data.batches():
            data.learn(language.answers(**inputs))
            sizes.append(len(inputs["tokens"]))
        assert [len(inputs["tokens"]) for inputs, _ in data.batches()] == sizes == [1, *[3] * 21]
