"""The ONNX methods: real exports, real quantizers, answers near the original's, and a row for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import compression
from fixtures.compression import IMAGES, PIXELS, STATES, TOKENS, order, original_artifact
from torch import nn

from weighbridge.engines import tensors
from weighbridge.engines.errors import InvalidInput
from weighbridge.engines.load import load
from weighbridge.engines.manifest import ArtifactFile
from weighbridge.engines.protocols import Array, Session
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression.types import Built, NotApplicable, Original

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime")
methods = pytest.importorskip("weighbridge.workers.compression.onnx_methods")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Original]:
    """Originals by name, each exported once."""
    made: dict[str, Original] = {}
    specs = {"mlp": PIXELS, "conv_net": IMAGES, "transformer_block": STATES, "tied_language_model": TOKENS}

    def make(name: str) -> Original:
        if name not in made:
            module = getattr(compression, name)()
            made[name] = original_artifact(tmp_path_factory.mktemp(name), module, specs[name])
        return made[name]

    return make


def opened(original: Original, built: Built) -> Session:
    """What hosts would load."""
    assert built.program is not None
    assert built.program.digest is not None
    path = built.files["model.onnx"]
    changes = {
        "files": (ArtifactFile(path="model.onnx", size=path.stat().st_size, digest=built.program.digest),),
        "program": built.program,
        "binding": built.binding,
        "engine": built.engine,
    }
    return load(original.manifest.model_copy(update=changes), lambda _: path)


def answers(session: Session) -> Array:
    return session.infer(tensors.synthetic(session.inputs, size=32, seed=7))["output"]


def error(original: Original, built: Built) -> float:
    """Root mean square of the difference, as a share of the original's."""
    want, got = answers(load(original.manifest, original.cache)), answers(opened(original, built))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def rows_of(built: Built) -> dict[str, VariantTensor]:
    return {row.name: row for row in built.tensors}


def ratio(built: Built) -> float:
    return sum(row.bytes_out for row in built.tensors) / sum(row.bytes_in for row in built.tensors)


@pytest.mark.parametrize(
    ("method", "action", "error_below", "ratio_below", "sqnr_above"),
    [
        ("onnx", "kept", 1e-5, 1.001, None),
        ("onnx-fp16", "cast to fp16", 2e-3, 0.51, 70),
        ("onnx-int8-dynamic", "int8 per channel", 0.03, 0.28, 45),
        ("onnx-int8-static", "int8 per channel", 0.06, 0.30, 45),
        ("onnx-int8-weight-only", "int8 groups of 32", 0.03, 0.30, 45),
        ("onnx-int4-weight-only", "int4 groups of 32", 0.20, 0.18, 20),
    ],
)
def test_builds_a_smaller_form(
    method: str,
    action: str,
    error_below: float,
    ratio_below: float,
    sqnr_above: float | None,
    originals: Callable[[str], Original],
    tmp_path: Path,
) -> None:
    """Every method keeps its promised size, answers near the original, bit for bit the same at every load."""
    original = originals("mlp")
    built = methods.build(order(original, tmp_path / "made", method))
    rows = rows_of(built)
    assert rows.keys() == original.manifest.binding.keys()
    for layer in ("0", "2", "4"):
        row = rows[f"{layer}.weight"]
        assert row.action == action
        assert row.sqnr is None if sqnr_above is None else row.sqnr is not None and row.sqnr > sqnr_above
    assert ratio(built) <= min(ratio_below, built.promised_ratio * 1.001)
    assert built.files["model.onnx"].stat().st_size < sum(row.bytes_out for row in built.tensors) + 8000
    assert error(original, built) < error_below
    np.testing.assert_array_equal(answers(opened(original, built)), answers(opened(original, built)))
    assert (built.calibration == "synthetic") == (method == "onnx-int8-static")


def test_quantizes_convolutions_with_their_batch_norms(originals: Callable[[str], Original], tmp_path: Path) -> None:
    """Static int8 covers convolutions; the batch norms that the export folds into them are named, not lost."""
    original = originals("conv_net")
    built = methods.build(order(original, tmp_path / "made", "onnx-int8-static", calibration_rows=64))
    rows = rows_of(built)
    assert [rows[name].action for name in ("0.weight", "3.weight", "8.weight")] == ["int8 per channel"] * 3
    assert (rows["1.running_var"].action, rows["1.running_var"].bytes_out) == ("merged", 0)
    assert error(original, built) < 0.03


def test_keeps_what_the_wish_skips(originals: Callable[[str], Original], tmp_path: Path) -> None:
    """A skipped layer stays in float32 and says by which pattern; the free length stays free."""
    original = originals("transformer_block")
    built = methods.build(order(original, tmp_path / "made", "onnx-int4-weight-only", skip=["down"], group=64))
    rows = rows_of(built)
    assert (rows["down.weight"].action, rows["down.weight"].reason) == ("kept", "skipped by down")
    assert rows["up.weight"].action == "int4 groups of 64"
    session = opened(original, built)
    assert session.infer({"states": np.ones((3, 5, 64), dtype=np.float32)})["output"].shape == (3, 5, 64)


def test_counts_both_copies_of_a_tied_weight(originals: Callable[[str], Original], tmp_path: Path) -> None:
    """Where the export makes two of one weight, its row has the bytes of both and the ratio of the worse."""
    original = originals("tied_language_model")
    row = rows_of(methods.build(order(original, tmp_path / "made", "onnx-int8-dynamic")))["embedding.weight"]
    assert row.action == "int8 per channel, uint8 per tensor"
    assert row.bytes_in // 2 < row.bytes_out < row.bytes_in * 0.6


def test_says_that_half_precision_grows(tmp_path: Path) -> None:
    """bf16 weights become float32, twice their size, and the promise says so."""
    import torch

    module = compression.mlp()
    state = {name: value.to(torch.bfloat16) for name, value in module.state_dict().items()}
    original = original_artifact(tmp_path / "original", module, PIXELS, state)
    built = methods.build(order(original, tmp_path / "made", "onnx"))
    assert built.promised_ratio == pytest.approx(2)
    assert ratio(built) == pytest.approx(2)
    assert error(original, built) < 0.02


def strange() -> Any:
    """A program with an operator that ONNX has not."""
    import torch
    from torch import nn

    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 8)

        def forward(self, x: Any) -> Any:
            return torch.special.bessel_j0(self.fc(x))

    return Strange().eval()


def test_names_the_operator_that_cannot_be_exported(tmp_path: Path) -> None:
    """A program that ONNX cannot hold is not applicable, by the operator's name."""
    original = original_artifact(tmp_path / "original", strange(), PIXELS)
    with pytest.raises(NotApplicable, match="bessel_j0"):
        methods.build(order(original, tmp_path / "made", "onnx"))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"method": "onnx-int4-weight-only", "group": 24}, "a group of 24"),
        ({"method": "onnx-int8-weight-only", "group": 8}, "powers of two from 16"),
        ({"method": "onnx-int8-weight-only", "skip": ["*"]}, r"no weight can be changed; .* skipped by \*"),
    ],
)
def test_says_what_does_not_fit(
    wish: Mapping[str, Any], said: str, originals: Callable[[str], Original], tmp_path: Path
) -> None:
    """A group that no kernel takes, or a wish that leaves nothing to quantize, is no silent copy."""
    with pytest.raises(NotApplicable, match=said):
        methods.build(order(originals("mlp"), tmp_path / "made", **wish))


def test_an_output_may_have_the_name_of_a_value_inside(tmp_path: Path) -> None:
    """The exporter calls an embedding's result `embedding`, which is what its owner may call the output."""
    original = original_artifact(tmp_path, nn.Sequential(nn.Embedding(10, 8), nn.Tanh()), TOKENS)
    outputs = tuple(spec.model_copy(update={"name": "embedding"}) for spec in original.manifest.outputs)
    named = replace(original, manifest=original.manifest.model_copy(update={"outputs": outputs}))
    model = pytest.importorskip("weighbridge.workers.compression.onnx_export").export(named).model
    assert [value.name for value in model.graph.output] == ["embedding"]
    pytest.importorskip("onnx").checker.check_model(model)


def test_an_onnx_variant_keeps_the_contract(originals: Callable[[str], Original], tmp_path: Path) -> None:
    """Tokens beyond the vocabulary, of which onnxruntime takes the negative ones, stay the client's fault."""
    original = originals("tied_language_model")
    variant = opened(original, methods.build(order(original, tmp_path / "out", "onnx")))
    first = load(original.manifest, original.cache)
    for length in (1, 3, 8, 40):
        tokens = {"tokens": np.random.default_rng(length).integers(0, 100, (2, length))}
        np.testing.assert_allclose(variant.infer(tokens)["output"], first.infer(tokens)["output"], rtol=1e-3, atol=1e-4)
    for session in (variant, first):
        for value in (100, -1):
            with pytest.raises(InvalidInput, match=f"values must be from 0 to 99, not {value}"):
                session.infer({"tokens": np.array([[1, value]])})
