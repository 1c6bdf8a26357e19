"""Digits: a cast of the weights is kept, noise is refused with its numbers, from the command line too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.compression import PIXELS, blobs_in, original_artifact
from fixtures.digits import Digits
from safetensors.numpy import save

from weighbridge.engines.manifest import ArtifactFile
from weighbridge.registry.recipe import Quality
from weighbridge.workers.compression.types import Original
from weighbridge.workers.evaluate import CompareTask, compare, main


class Trained:
    """The digits' linear program with its solved weights, and the held-out images."""

    def __init__(self, folder: Path, digits: Digits) -> None:
        from torch import nn

        self.folder, self.digits = folder, digits
        state = {name.removeprefix("linear."): torch.from_numpy(one) for name, one in digits.train(1397).items()}
        linear = nn.Linear(64, 10)
        linear.load_state_dict(state)
        self.original: Original = original_artifact(folder, nn.Sequential(linear).eval(), PIXELS)
        self.dataset = self.add(save({"pixels": digits.held_out, "labels": digits.held_out_labels}))

    def add(self, data: bytes) -> str:
        return blobs_in(self.folder).put_bytes(data).digest

    def variant(self, dtype: torch.dtype, noise: float = 0.0) -> str:
        from safetensors.torch import save as save_torch

        torch.manual_seed(0)
        state = {name.replace("linear", "0"): torch.from_numpy(one) for name, one in self.digits.train(1397).items()}
        file = blobs_in(self.folder).put_bytes(
            save_torch({name: (one + noise * torch.randn(one.shape)).to(dtype) for name, one in state.items()})
        )
        files = (ArtifactFile(path="model.safetensors", size=file.size, digest=file.digest),)
        return self.add(self.original.manifest.model_copy(update={"files": files}).canonical())

    def compare(self, artifact: str, dataset: str | None, **quality: Any) -> Any:
        task = CompareTask(artifact, self.original.manifest.digest, dataset, quality=Quality(**quality))
        return compare(task, cache=self.original.cache)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Trained:
    return Trained(tmp_path_factory.mktemp("digits"), digits)


def test_a_cast_is_kept(trained: Trained) -> None:
    """bfloat16 weights keep 99% of the accuracy with 95% certainty on 400 images, and the answers without any."""
    outcome = trained.compare(trained.variant(torch.bfloat16), trained.dataset)
    assert outcome.verdict == "passed", outcome.reason
    assert outcome.facts["kept_bound"] >= 0.99
    assert trained.compare(trained.variant(torch.bfloat16), None).verdict == "passed"


def test_noise_is_refused(trained: Trained) -> None:
    """Every judgement has its numbers: what is kept, the bound, what was asked."""
    bad = trained.variant(torch.float32, noise=0.05)
    outcome = trained.compare(bad, trained.dataset)
    assert outcome.verdict == "rejected"
    (gate,) = outcome.gates
    assert gate.reason == outcome.reason
    assert "of accuracy 0.86 (95% bound " in gate.reason
    assert "needs 99%" in gate.reason
    assert gate.observed is not None
    assert gate.observed < outcome.facts["kept"] < 0.99
    assert trained.compare(bad, None).verdict == "rejected"


def test_a_comparison_runs_by_itself(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m weighbridge.workers.evaluate --against ORIGINAL` prints JSON or tables; the status is the verdict."""
    good, bad = trained.variant(torch.bfloat16), trained.variant(torch.float32, noise=0.05)
    options = ["--blobs", str(trained.folder), "--against", trained.original.manifest.digest]
    assert main([good, trained.dataset, *options, "--quality", '{"keep": 0.9}']) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["verdict"], said["facts"]["metric"], said["gates"][0]["limit"]) == ("passed", "accuracy", 0.9)
    assert main([bad, *options, "--tables"]) == 1
    assert "quality.min_top1" in capsys.readouterr().out
