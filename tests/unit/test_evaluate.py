"""The stage evaluate: numbers from a real artifact, gates with what decided them, and no pass without evidence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fixtures.engines import LocalBlobs, make_checkpoint
from safetensors.numpy import save

from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest
from weighbridge.registry.recipe import Gate
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.folder import FolderStore
from weighbridge.workers.evaluate import Champion, EvaluateTask, evaluate, main

ROWS = 600


class Bench:
    """Two artifacts (seeds 1 and 2) and a set whose labels are what seed 1 answers, 10% of them spoilt."""

    def __init__(self, folder: Path, make: Callable[[Path], Manifest], blobs: LocalBlobs) -> None:
        self.blobs = blobs
        manifests = [make(make_checkpoint(folder / f"{seed}.safetensors", seed)) for seed in (1, 2)]
        self.good, self.other = (blobs.add(manifest.canonical()) for manifest in manifests)
        self.pixels = np.random.default_rng(0).standard_normal((ROWS, 64)).astype(np.float32)
        self.labels = load(manifests[0], blobs).infer({"pixels": self.pixels})["logits"].argmax(1)
        self.labels[::10] = (self.labels[::10] + 1) % 10
        self.dataset = self.add(pixels=self.pixels, labels=self.labels)

    def add(self, **tensors: Any) -> str:
        return self.blobs.add(save(tensors))

    def run(self, *gates: Gate, **changes: Any) -> Any:
        task = {"artifact": self.good, "dataset": self.dataset, "gates": gates} | changes
        return evaluate(EvaluateTask(**task), cache=self.blobs)


@pytest.fixture
def bench(tmp_path: Path, make_manifest: Callable[[Path], Manifest], local_blobs: LocalBlobs) -> Bench:
    return Bench(tmp_path, make_manifest, local_blobs)


def test_scores_and_slices(bench: Bench) -> None:
    """All rows count, in several batches; every class has its own numbers."""
    outcome = bench.run(Gate(metric="accuracy", min=0.9))
    assert outcome.verdict == "passed"
    metrics = {(one.name, one.slice): one.value for one in outcome.metrics}
    assert metrics["accuracy", ""] == pytest.approx(0.9)
    assert sum(value for (name, _), value in metrics.items() if name == "support") == ROWS
    assert {one.dataset_digest for one in outcome.metrics} == {bench.dataset}
    (gate,) = outcome.gates
    assert (gate.gate, gate.verdict, gate.observed, gate.limit) == ("accuracy.min", "passed", 0.9, 0.9)


def test_a_gate_rejects_with_its_numbers(bench: Bench) -> None:
    """The reason says metric, value, limit and rule."""
    outcome = bench.run(Gate(metric="accuracy", min=0.95), Gate(metric="f1", max=0.1))
    assert outcome.verdict == "rejected"
    assert outcome.reason.startswith("accuracy 0.90 < 0.95 (min); f1 0.")
    assert outcome.metrics


def test_max_drop_compares_with_the_champion(bench: Bench) -> None:
    """On this evaluation set: from its known number, else by evaluating it again; without one `min` decides."""
    gate = Gate(metric="accuracy", min=0.0, max_drop=0.05)
    champion = Champion(7, bench.good)
    outcome = bench.run(gate, artifact=bench.other, champion=champion)
    assert outcome.verdict == "rejected"
    assert "below champion 7's 0.9 (max_drop 0.05)" in outcome.reason
    assert bench.run(gate, artifact=bench.good, champion=Champion(7, bench.other)).verdict == "passed"
    assert bench.run(gate, champion=Champion(7, "0" * 64, {"accuracy": 0.96})).verdict == "rejected"
    assert bench.run(gate, champion=Champion(7, "0" * 64, {"accuracy": 0.95})).verdict == "passed"
    alone = bench.run(gate)
    assert alone.verdict == "passed"
    assert [one.verdict for one in alone.gates] == ["passed", "not_applicable"]


def test_a_champion_that_cannot_be_compared_with_fails_the_gate(bench: Bench) -> None:
    """It takes other inputs, say: nobody knows the drop, so nothing passes by it."""
    broken = Manifest.model_validate_json(bench.blobs(bench.other).read_bytes())
    inputs = (broken.inputs[0].model_copy(update={"name": "image"}),)
    champion = Champion(3, bench.blobs.add(broken.model_copy(update={"inputs": inputs}).canonical()))
    outcome = bench.run(Gate(metric="accuracy", max_drop=0.5), champion=champion)
    assert outcome.verdict == "rejected"
    assert "champion 3 cannot be evaluated on this set: image is missing" in outcome.reason


def test_a_gate_without_evidence_is_not_passed(bench: Bench) -> None:
    """No set: not applicable where no gate stands, rejected where one does."""
    assert bench.run(dataset=None).verdict == "not_applicable"
    outcome = bench.run(Gate(metric="accuracy", min=0.1), dataset=None)
    assert (outcome.verdict, outcome.gates[0].verdict) == ("rejected", "failed")
    assert outcome.reason == "the gates cannot be judged: there is no eval.safetensors"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"labels": None}, "labels is missing"),
        ({"pixels": None}, "pixels is missing; it needs labels, pixels"),
        ({"labels": np.zeros(ROWS, np.float32)}, "labels must be a vector of integers"),
        ({"labels": np.zeros(3, np.int64)}, "one row for each of 3 labels"),
        ({"labels": np.full(ROWS, -1)}, "classes run from -1"),
        ({"pixels": np.zeros((ROWS, 63), np.float32)}, "shape must be"),
        ({"pixels": np.zeros((ROWS, 64), ml_dtypes.bfloat16)}, "datatype must be FP32"),
        ({"pixels": np.zeros((0, 64), np.float32), "labels": np.zeros(0, np.int64)}, "no rows"),
        ({"pixels": np.zeros((4, 0), np.float32), "labels": np.zeros(4, np.int64)}, "its rows are empty"),
    ],
)
def test_a_bad_set_is_named(bench: Bench, change: dict[str, Any], rule: str) -> None:
    """The reason names file, tensor and rule; with a gate it rejects."""
    tensors = {"pixels": bench.pixels, "labels": bench.labels} | change
    dataset = bench.add(**{name: value for name, value in tensors.items() if value is not None})
    outcome = bench.run(Gate(metric="accuracy", min=0.1), dataset=dataset)
    assert outcome.verdict == "rejected"
    assert "eval.safetensors" in outcome.reason
    assert rule in outcome.reason
    assert bench.run(dataset=dataset).verdict == "not_applicable"


def test_a_corrupt_set_is_named(bench: Bench) -> None:
    """Not a safetensors file, or one that says two things at once."""
    for data in (b"\x80\x04hello", b"", save({"labels": bench.labels})[:-3]):
        assert bench.run(Gate(metric="accuracy", min=0), dataset=bench.blobs.add(data)).verdict == "rejected"


def test_a_blob_that_is_not_here_is_for_a_retry(bench: Bench) -> None:
    """Raised, not judged."""
    with pytest.raises(LookupError):
        bench.run(dataset="f" * 64)


def test_the_stage_runs_by_itself(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m weighbridge.workers.evaluate` prints the verdict and every number as JSON."""
    blobs = Blobs(FolderStore(tmp_path / "store", create=True))
    for path in (tmp_path / "blobs").iterdir():
        blobs.put_bytes(path.read_bytes())
    assert main([bench.good, bench.dataset, "--blobs", str(tmp_path / "store")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["metrics"][0]["name"]) == ("passed", "accuracy")
