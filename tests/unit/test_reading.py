"""A metric reads the output that it means, as what it is, or says what to write; the set is blamed for the set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.compression import blobs_in, original_artifact
from safetensors.numpy import save
from safetensors.torch import load_file
from safetensors.torch import save as save_torch
from torch import nn

from weighbridge.engines.manifest import ArtifactFile, TensorSpec
from weighbridge.registry.errors import InvalidRecipe
from weighbridge.registry.recipe import Gate, Quality, parse
from weighbridge.registry.schemas import Variant
from weighbridge.report import subject, tables
from weighbridge.workers.compression.types import Original
from weighbridge.workers.evaluate import EvaluateTask, evaluate
from weighbridge.workers.evaluation import reading
from weighbridge.workers.evaluation.compare import CompareTask, compare
from weighbridge.workers.evaluation.datasets import Batch
from weighbridge.workers.evaluation.outputs import LARGEST, OutputDrift
from weighbridge.workers.outcome import Outcome

ROWS = 400
X = (TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),)
RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((ROWS, 4)).astype(np.float32)
WEIGHT = np.array([[1.0, 2, -1, 0.5]], np.float32)
RARE = (INPUTS @ WEIGHT.T > 2.5).astype(np.int64)[:, 0]
"""Classes 0 and 1, of which 1 is rare."""


class Linear(nn.Module):
    """`x · weight + bias`, with or without a sigmoid, [n, 1] or [n]."""

    def __init__(self, columns: int = 1, end: Callable[[Any], Any] | None = None, flat: bool = False) -> None:
        super().__init__()
        self.layer, self.end, self.flat = nn.Linear(4, columns), end, flat

    def forward(self, x: Any) -> Any:
        y = self.layer(x)
        y = self.end(y) if self.end is not None else y
        return y[:, 0] if self.flat else y


def filled(module: Any, weight: Any, bias: float) -> Any:
    with torch.no_grad():
        module.layer.weight.copy_(torch.tensor(weight))
        module.layer.bias.fill_(bias)
    return module.eval()


@dataclass
class Bench:
    folder: Path
    original: Original

    def add(self, **tensors: Any) -> str:
        return blobs_in(self.folder).put_bytes(save(tensors)).digest

    def run(self, dataset: str, **changes: Any) -> Outcome:
        given = {"gates": (Gate(metric="accuracy", min=0.8),)} | changes
        task = EvaluateTask(self.original.manifest.digest, dataset, **given)
        return evaluate(task, cache=self.original.cache)

    def variant(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> str:
        (file,) = self.original.manifest.files
        weights = {n: change(n, v) for n, v in load_file(self.original.cache(file.digest)).items()}
        blob = blobs_in(self.folder).put_bytes(save_torch(weights))
        made = ArtifactFile(path=file.path, size=blob.size, digest=blob.digest)
        manifest = self.original.manifest.model_copy(update={"files": (made,)})
        return blobs_in(self.folder).put_bytes(manifest.canonical()).digest

    def compare(self, artifact: str, dataset: str | None, quality: Quality | None = None, **how: Any) -> Outcome:
        asked = quality or Quality(keep=0.5)
        task = CompareTask(artifact, self.original.manifest.digest, dataset, quality=asked, **how)
        return compare(task, cache=self.original.cache)


def bench(folder: Path, module: Any, outputs: tuple[str, ...] = ("y",), inputs: Any = X) -> Bench:
    return Bench(folder, original_artifact(folder, module, inputs, outputs=outputs))


def accuracy(outcome: Outcome) -> float:
    return next(one.value for one in outcome.metrics if (one.name, one.slice) == ("accuracy", ""))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("end", [None, torch.sigmoid])
def test_one_number_a_row_decides_between_two_classes(tmp_path: Path, end: Any, flat: bool) -> None:
    """Above 0 for logits, above 0.5 for probabilities; a right, a constant and an inverted model differ."""
    seen = {}
    for name, weight, bias in (("right", WEIGHT, -2.5), ("never", 0 * WEIGHT, -5.0), ("inverted", -WEIGHT, 2.5)):
        made = bench(tmp_path / name, filled(Linear(end=end, flat=flat), weight, bias))
        seen[name] = made.run(made.add(x=INPUTS, labels=RARE), gates=())
    rare = float(RARE.mean())
    assert {name: accuracy(one) for name, one in seen.items()} == pytest.approx(
        {"right": 1.0, "never": 1 - rare, "inverted": 0.0}
    )
    assert "every row is answered with class 0: the model tells nothing apart" in seen["never"].facts["notes"]
    how = "probabilities: class 1 above 0.5" if end else "logits: class 1 above 0"
    assert seen["right"].facts["notes"] == [f"output y is read as {how}"]


def test_a_name_that_says_logit_is_believed(tmp_path: Path) -> None:
    """Logits that all lie within 0 to 1 are no probabilities."""
    made = bench(tmp_path, filled(Linear(), 0 * WEIGHT, 0.3), ("logit",))
    outcome = made.run(made.add(x=INPUTS, labels=RARE), gates=())
    assert accuracy(outcome) == pytest.approx(RARE.mean())
    assert "output logit is read as logits: class 1 above 0" in outcome.facts["notes"]


def test_the_recipe_gives_the_threshold(tmp_path: Path) -> None:
    """What no output can tell (logits that lie within 0 to 1 by chance) the recipe says; elsewhere it has no place."""
    made = bench(tmp_path / "one", filled(Linear(end=torch.sigmoid), WEIGHT, 0.0))
    dataset = made.add(x=INPUTS, labels=RARE)
    assert accuracy(made.run(dataset, gates=())) < 0.9
    assert accuracy(made.run(dataset, gates=(), threshold=float(1 / (1 + np.exp(-2.5))))) == 1.0
    many = bench(tmp_path / "many", Linear(columns=3).eval())
    outcome = many.run(many.add(x=INPUTS, labels=RARE), threshold=0.5)
    assert "recipe.yaml: threshold: output y is FP32[-1, 3], not one number a row" in outcome.reason
    with pytest.raises(InvalidRecipe, match="threshold is for task: classification"):
        parse("task: regression\nthreshold: 0.5\n")


def test_a_variant_of_one_logit_is_compared_by_what_it_decides(tmp_path: Path) -> None:
    """A rounding changes logits and no answer; an inverted variant keeps nothing. With a set and without."""
    made = bench(tmp_path, filled(Linear(), WEIGHT, -2.5))
    dataset = made.add(x=INPUTS, labels=RARE)
    near = made.variant(lambda name, value: value * 1.001)
    far = made.variant(lambda name, value: -value)
    for where in (dataset, None):
        assert made.compare(near, where).verdict == "passed"
        assert made.compare(far, where).verdict == "rejected"


SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "beyond the classes": ({"labels": np.where(RARE, 7, 0)}, "run from 0 to 7, output y has 0 to 2"),
    "from one": ({"labels": RARE + 1 + (np.arange(ROWS) % 2)}, "run from 1 to 3, output y has 0 to 2; they seem to"),
    "negative": ({"labels": RARE - 100}, "run from -100 to -99: a class is 0 or more"),
    "signs": ({"labels": 2 * RARE - 1}, "run from -1 to 1: write 0 and 1"),
    "one class": ({"labels": np.zeros(ROWS, np.int64)}, "all of the class 0"),
    "one-hot": ({"labels": np.eye(3, dtype=np.int64)[RARE]}, "of one-hot labels write each row's class"),
    "a column": ({"labels": RARE[:, None]}, "write them as a vector of 400"),
    "floats": ({"labels": RARE.astype(np.float32)}, "write each row's class as an integer"),
    "too few": ({"labels": RARE[:300]}, "one row for each of 300 labels"),
    "none": ({"x": INPUTS[:0], "labels": RARE[:0]}, "no rows"),
    "NaN": ({"x": np.where(np.arange(ROWS)[:, None] == 17, np.nan, INPUTS).astype(np.float32)}, "NaN in row 17"),
    "infinities": ({"x": np.where(INPUTS > 3, np.inf, INPUTS * np.inf).astype(np.float32)}, "x holds infinities"),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.manual_seed(0)
    return bench(tmp_path_factory.mktemp("three"), Linear(columns=3).eval())


@pytest.mark.parametrize("kind", SPOILT)
def test_a_set_that_means_nothing_is_blamed_itself(three: Bench, kind: str) -> None:
    """The reason names eval.safetensors, the tensor and what to do, and says nothing against the artifact."""
    tensors, said = SPOILT[kind]
    dataset = three.add(**{"x": INPUTS, "labels": RARE} | tensors)
    outcome = three.run(dataset)
    assert outcome.reason.startswith("the gates cannot be judged: eval.safetensors: ")
    assert said in outcome.reason
    assert "artifact" not in outcome.reason
    assert three.run(dataset, gates=()).verdict == "not_applicable"
    assert three.compare(three.original.manifest.digest, dataset).reason.startswith("eval.safetensors: ")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.full((ROWS, 3), np.nan, np.float32), "labels holds NaN or infinity in row 0"),
        (np.zeros((ROWS, 3), np.int64), "write them as F32"),
        (np.zeros((ROWS, 1), np.float32), "output y is float64[1, 3], labels are [1, 1]"),
        (np.zeros(ROWS, np.float32), "output y is float64[1, 3], labels are [1]"),
    ],
)
def test_targets_that_do_not_fit_are_of_the_set(three: Bench, labels: Any, said: str) -> None:
    """Nothing is broadcast, and what is no number is not the model's fault."""
    outcome = three.run(three.add(x=INPUTS, labels=labels), task="regression", gates=(Gate(metric="mse", max=1),))
    assert outcome.reason.startswith("the gates cannot be judged: eval.safetensors: ")
    assert said in outcome.reason


def test_a_column_of_targets_is_a_vector(tmp_path: Path) -> None:
    """[n] against [n, 1] is row by row, never [n, n]."""
    made = bench(tmp_path, filled(Linear(), WEIGHT, 0.0))
    wanted = (INPUTS @ WEIGHT.T)[:, 0] + np.float32(0.5)
    outcome = made.run(made.add(x=INPUTS, labels=wanted), task="regression", gates=(Gate(metric="mse", max=0.26),))
    assert outcome.verdict == "passed", outcome.reason
    assert next(one.value for one in outcome.metrics if one.name == "mse") == pytest.approx(0.25, rel=1e-5)


class Words(nn.Module):
    """Tokens to scores of the next: logits or probabilities."""

    def __init__(self, probabilities: bool) -> None:
        super().__init__()
        self.table, self.probabilities = nn.Embedding(20, 20), probabilities

    def forward(self, tokens: Any) -> Any:
        scores = self.table(tokens)
        return scores.softmax(-1) if self.probabilities else scores


def test_perplexity_of_probabilities_is_that_of_their_logits(tmp_path: Path) -> None:
    """A softmax is not taken twice; the notes say that there was one."""
    tokens = RNG.integers(0, 20, (30, 7))
    seen = []
    for probabilities in (False, True):
        torch.manual_seed(0)
        spec = (TensorSpec(name="tokens", datatype="INT64", shape=(-1, -1)),)
        made = bench(tmp_path / str(probabilities), Words(probabilities).eval(), inputs=spec)
        gate = Gate(metric="perplexity", max=1e9)
        outcome = made.run(made.add(tokens=tokens), task="language", gates=(gate,))
        seen.append(next(one.value for one in outcome.metrics if one.name == "perplexity"))
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
    assert outcome.facts["notes"] == ["output y holds probabilities, and is read as such"]


class Heads(nn.Module):
    """A head of classes and one of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.price = nn.Linear(4, 3), nn.Linear(4, 8)

    def forward(self, x: Any) -> Any:
        return self.price(x), self.cls(x)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The head of classes is the second output."""
    torch.manual_seed(0)
    return bench(tmp_path_factory.mktemp("heads"), Heads().eval(), ("price", "scores"))


def labelled(heads: Bench) -> str:
    (file,) = heads.original.manifest.files
    weights = load_file(heads.original.cache(file.digest))
    scores = INPUTS @ weights["cls.weight"].numpy().T + weights["cls.bias"].numpy()
    return heads.add(x=INPUTS, labels=scores.argmax(1))


def test_the_output_that_is_named_is_read_and_the_others_are_judged(heads: Bench) -> None:
    """A variant that keeps all of the accuracy and ruins the other head is refused, by the name of the output."""
    dataset = labelled(heads)
    own = heads.run(dataset)
    assert (own.verdict, own.facts["output"], accuracy(own)) == ("passed", "scores", 1.0)
    ruined = heads.variant(lambda name, value: value.flip(0) if name.startswith("price") else value)
    for where in (dataset, None):
        outcome = heads.compare(ruined, where)
        assert outcome.verdict == "rejected"
        assert "output price: error 1." in outcome.reason
        assert [one.gate for one in outcome.gates if one.verdict == "failed"] == ["quality.outputs.price.max_error"]
        assert heads.compare(heads.variant(lambda name, value: value * 1.001), where).verdict == "passed"
    named = {(one.name, one.slice) for one in heads.compare(ruined, dataset).metrics}
    assert {("error", "output=price"), ("cosine", "output=price"), ("max_abs", "output=price")} <= named
    loose = Quality.model_validate({"keep": 0.5, "outputs": {"price": {"max_error": 10}}})
    assert heads.compare(ruined, dataset, loose).verdict == "passed"
    strict = Quality.model_validate({"keep": 0.5, "outputs": {"scores": {"max_error": 1e-9}}})
    outcome = heads.compare(heads.variant(lambda name, value: value * 1.001), dataset, strict)
    assert (
        outcome.reason.endswith("output scores: error 0.001 > 0.00 (max)") or "output scores: error" in outcome.reason
    )


def test_an_output_that_is_not_there_is_refused_with_those_that_are(heads: Bench) -> None:
    """In `output:` and in `quality.outputs:`; where the outputs stand in the recipe, when it is read."""
    dataset = labelled(heads)
    assert (
        "recipe.yaml: output: logits is none of the program's outputs (price, scores)"
        in heads.run(dataset, output="logits").reason
    )
    wrong = Quality.model_validate({"outputs": {"cost": {"max_error": 1}}})
    outcome = heads.compare(heads.original.manifest.digest, dataset, wrong)
    assert outcome.reason == "recipe.yaml: quality.outputs: cost is none of the program's outputs (price, scores)"
    spec = "{name: y, datatype: FP32, shape: [-1, 2]}"
    with pytest.raises(InvalidRecipe, match=r"z is none of the outputs \(y\)"):
        parse(f"program: {{factory: 'a:b'}}\ninputs: [{spec}]\noutputs: [{spec}]\noutput: z\n")
    assert parse("output: y\nthreshold: 0.5\n").output == "y"
    assert parse("gates: []\n").output is None


@dataclass
class Labels:
    """What a rule may know of a set."""

    classes: tuple[int, int] | None = None
    label_shape: tuple[int, ...] | None = None
    rows: int = 1

    def batches(self) -> Iterator[Batch]:
        return iter(())

    def learn(self, *outputs: Any) -> None: ...


def spec(name: str, *shape: int, datatype: str = "FP32") -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=(-1, *shape))


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "chosen"),
    [
        ("classification", [spec("hidden", 64), spec("class_logits", 10)], Labels((0, 9)), "class_logits"),
        ("classification", [spec("a", 3), spec("b", 10)], Labels((0, 9)), "b"),
        ("classification", [spec("a", 10), spec("b", 10)], Labels((0, 9)), None),
        ("classification", [spec("logits", 10), spec("scores", 10)], Labels((0, 9)), None),
        ("classification", [spec("boxes", 5, 4), spec("y", 10)], Labels((0, 9)), "y"),
        ("classification", [spec("mask", 10, datatype="BOOL"), spec("y", 10)], Labels((0, 9)), "y"),
        ("regression", [spec("a", 3), spec("b")], Labels(None, (50, 1)), "b"),
        ("regression", [spec("a", 3), spec("b", 3)], Labels(None, (50, 3)), None),
        ("language", [spec("hidden", -1, 64), spec("logits", -1, 100)], Labels(), "logits"),
        ("language", [spec("pooled", 64), spec("y", -1, 100)], Labels(), "y"),
        ("embedding", [spec("tokens", -1, 64), spec("pooled", 64)], Labels(), "pooled"),
        ("embedding", [spec("a", 8), spec("sentence_embedding", 64)], Labels(), "sentence_embedding"),
    ],
)
def test_one_of_several_outputs_is_chosen_by_rule_or_not_at_all(
    task: Any, outputs: list[TensorSpec], labels: Labels, chosen: str | None
) -> None:
    """By what fits, then by its name, in whatever order they stand; never the first because it is the first."""
    for order in (outputs, outputs[::-1]):
        if chosen is not None:
            assert reading.choose(task, order, labels, None).name == chosen
            continue
        with pytest.raises(reading.Unclear, match="say which one"):
            reading.choose(task, order, labels, None)
        assert reading.choose(task, order, labels, outputs[1].name) == outputs[1]


def drift(original: Any, variant: Any, name: str = "y", datatype: str = "FP32") -> dict[str, float]:
    """In two batches."""
    seen = OutputDrift(TensorSpec(name=name, datatype=datatype, shape=(-1, *original.shape[1:])))
    seen.add(original[:3], variant[:3])
    seen.add(original[3:], variant[3:])
    return seen.results()


def test_an_error_is_a_share_of_what_varies() -> None:
    """Of each column in its own unit, whatever its offset; an output that never varies by its size."""
    numbers = RNG.standard_normal((200, 4)) * [1000, 1, 0.01, 50] + [1e6, 0, 0.5, -20]
    spread = numbers.std(0)
    assert drift(numbers, numbers)["error"] == 0
    assert drift(numbers, numbers + 0.05 * spread)["error"] == pytest.approx(0.05)
    wrong = numbers.copy()
    wrong[:, 2] = RNG.permutation(wrong[:, 2])
    assert drift(numbers, wrong)["error"] > 0.5
    constant = np.full((200, 4), 8.0)
    assert drift(constant, constant + 2)["error"] == pytest.approx(0.25)
    assert drift(0 * constant, constant)["error"] == LARGEST
    assert drift(0 * constant, 0 * constant)["error"] == 0


def test_outputs_of_every_kind_are_measured() -> None:
    """Scores by divergence, whole numbers by how many stay, infinities by staying where they are."""
    logits = RNG.standard_normal((200, 7))
    assert drift(logits, logits + 0.5, "class_scores")["kl_mean"] == pytest.approx(0, abs=1e-12)
    assert drift(logits, -logits, "class_scores")["kl_mean"] > 0.5
    ids = np.arange(200)[:, None]
    assert drift(ids, np.where(ids < 20, 0, ids), "ids", "INT64") == {"top1": (200 - 19) / 200}
    masked = np.where(logits > 1, -np.inf, logits)
    assert drift(masked, masked)["error"] == 0
    assert drift(masked, logits)["error"] == LARGEST
    image = RNG.standard_normal((6, 3, 8, 8))
    assert drift(image, 1.01 * image)["error"] < 0.02
    assert drift(image[:, 0, 0, 0], 0 * image[:, 0, 0, 0])["error"] >= 1


def test_a_report_says_how_far_the_other_outputs_drift(heads: Bench) -> None:
    """Beside the drift of the one that is read, which no other's figures replace."""
    ruined = heads.variant(lambda name, value: value.flip(0) if name.startswith("price") else value)
    outcome = heads.compare(ruined, labelled(heads))
    variant = Variant(name="v", status="rejected", metrics=list(outcome.metrics), gates=list(outcome.gates))
    drift = tables._drift(variant)
    assert drift.startswith("top-1 1, ")
    assert ", price error 1." in drift
    assert subject.metric(variant, "error") is None
