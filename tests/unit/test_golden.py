"""What a golden proves: other weights fail it however small outputs are, noise of other machines does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import compression
from fixtures.compression import IMAGES, PIXELS, STATES, TOKENS, order, original_artifact
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from weighbridge.engines import golden
from weighbridge.engines.errors import GoldenMismatch
from weighbridge.engines.load import load
from weighbridge.engines.manifest import ArtifactFile, Golden, Manifest, Program
from weighbridge.engines.other_weights import replace_weights

RNG = np.random.default_rng(0)


def matches(seen: Any, wanted: Any, dtype: str = "FP32") -> bool:
    try:
        golden.compare({"y": np.asarray(seen)}, {"y": np.asarray(wanted)}, *golden.TOLERANCES[dtype])
    except GoldenMismatch:
        return False
    return True


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def draws(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


KINDS: dict[str, Callable[[int], Any]] = {
    "logits": lambda seed: 3 * draws((4, 10), seed),
    "softmax of many classes": lambda seed: softmax(0.3 * draws((8, 200), seed)),
    "sure softmax": lambda seed: softmax(8 * draws((8, 10), seed)),
    "tiny": lambda seed: 1e-6 * draws((4, 3), seed),
    "huge": lambda seed: 1e9 * draws((4, 3), seed),
    "one row": lambda seed: draws((1, 10), seed),
    "one number a row": lambda seed: draws((4, 1), seed),
    "a vector": lambda seed: draws((4,), seed),
    "tokens": lambda seed: draws((2, 8, 50), seed),
    "logits that share an offset": lambda seed: draws((4, 10), seed) + 50 * draws((4, 1), 99),
    "masked logits": lambda seed: np.where(draws((4, 10), 99) > 1, -1e9, draws((4, 10), seed)),
    "impossible classes": lambda seed: np.where(draws((4, 10), 99) > 1, -np.inf, draws((4, 10), seed)),
}


@pytest.mark.parametrize("dtype", ["FP32", "FP16", "BF16"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_answers_never_match_and_rounding_always_does(kind: str, dtype: str) -> None:
    """Whatever the size of the outputs; what was rounded twice in the dtype that computes is the same answer."""
    wanted = KINDS[kind](1)
    assert matches(wanted, wanted, dtype)
    assert not matches(KINDS[kind](2), wanted, dtype)
    roundings = {"FP32": 3e-7, "FP16": 1e-3, "BF16": 8e-3}[dtype]
    plain = np.where(np.isfinite(wanted), wanted, 0)
    noise = roundings * np.abs(plain) * np.sign(RNG.standard_normal(wanted.shape))
    assert matches(wanted + noise, wanted, dtype)


@pytest.mark.parametrize("dtype", ["FP32", "FP16", "BF16"])
def test_a_small_column_beside_a_large_one_is_judged_by_itself(dtype: str) -> None:
    """A price in thousands does not let a probability be anything."""
    wanted = draws((16, 2)) * [1000, 0.1] + [5000, 0.5]
    wrong = wanted.copy()
    wrong[:, 1] = wanted[::-1, 1]
    assert not matches(wrong, wanted, dtype)


def test_small_differences_of_large_numbers_are_judged() -> None:
    """1000 ± 0.1 in float32: relative to the value nothing would be wrong."""
    assert not matches(1000 + 0.1 * draws((4, 10), 2), 1000 + 0.1 * draws((4, 10), 1))


def test_what_never_varies_is_judged_by_its_size() -> None:
    """Constants, zeros, single numbers: equal passes, another does not."""
    for value in (np.zeros((4, 3)), np.full((4, 3), 7.0), np.array([[3.0]]), np.array(3.0)):
        assert matches(value, value, "BF16")
        assert not matches(value + 1, value, "BF16")
    assert matches(np.zeros((0, 3)), np.zeros((0, 3)))
    assert not matches(np.zeros((4, 3)), np.zeros((4, 4)))


def test_whole_numbers_are_names() -> None:
    """Token 1000 is not nearly token 1001; of many, in a coarse dtype, a few ties may fall otherwise."""
    wanted = np.arange(1000, 1040)
    assert matches(wanted, wanted)
    assert not matches(wanted + 1, wanted, "BF16")
    tied = wanted.copy()
    tied[:3] += 1
    assert matches(tied, wanted, "BF16")
    assert not matches(tied, wanted, "FP32")
    assert not matches(np.array([True, False]), np.array([True, True]), "BF16")


def test_what_is_no_number_stays_where_it_is() -> None:
    """NaN and infinities match themselves alone."""
    wanted = np.array([[1.0, np.nan, -np.inf], [2.0, np.nan, -np.inf]])
    assert matches(wanted, wanted)
    for wrong in (np.nan_to_num(wanted), -wanted, np.full((2, 3), np.nan)):
        assert not matches(wrong, wanted)
    assert not matches(np.full((1, 3), np.nan), np.zeros((1, 3)))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.floats(0, 0.2), dtype=st.sampled_from(["FP32", "FP16", "BF16"]))
def test_what_matches_agrees_on_classes(seed: int, noise: float, dtype: str) -> None:
    """The largest of a row is the same, unless another is within the tolerance of it: a tie."""
    wanted = draws((4, 6), seed)
    seen = wanted + noise * draws((4, 6), seed + 1)
    if matches(seen, wanted, dtype):
        rows = np.arange(4)
        lead = wanted.max(1) - wanted[rows, seen.argmax(1)]
        tolerance = golden.TOLERANCES[dtype]
        assert (lead <= 4 * (tolerance.rtol * np.abs(wanted).max() + tolerance.spread * 2)).all()


def test_an_old_manifest_means_what_it_meant() -> None:
    """Without a spread: atol and rtol alone, and the digest that it had."""
    old = Golden(digest="0" * 64, size=0, rtol=1e-2, atol=1e-2)
    golden.compare({"y": np.array([0.019])}, {"y": np.array([0.01])}, *old.tolerance)
    with pytest.raises(GoldenMismatch, match="differs by up to"):
        golden.compare({"y": np.array([0.03])}, {"y": np.array([0.01])}, *old.tolerance)
    program = Program(kind="template", name="x")
    manifest = Manifest(variant="original", files=(), program=program, binding={}, inputs=(), outputs=(), golden=old)
    assert b"spread" not in manifest.canonical()
    new = manifest.model_copy(update={"golden": old.model_copy(update={"spread": 0.1})})
    assert Manifest.model_validate_json(new.canonical()) == new


MODULES = {"mlp": PIXELS, "conv_net": IMAGES, "transformer_block": STATES, "tied_language_model": TOKENS}


def _in(manifest: Manifest, folder: Path, cache: Any, dtype: torch.dtype) -> Manifest:
    """The same weights in another dtype, with the tolerance of that."""
    from safetensors.torch import load_file

    (file,) = manifest.files
    weights = {
        name: one.to(dtype) if one.is_floating_point() else one for name, one in load_file(cache(file.digest)).items()
    }
    blob = compression.blobs_in(folder).put_bytes(save(weights))
    name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    proof = manifest.golden.model_copy(update=golden.tolerance([name])._asdict())
    files = (ArtifactFile(path=file.path, size=blob.size, digest=blob.digest),)
    return manifest.model_copy(update={"files": files, "golden": proof})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MODULES)
def test_real_programs_match_themselves_and_no_other(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Rows alone and together, on one thread and on two; other weights of the program fail."""
    made = original_artifact(tmp_path, getattr(compression, name)(), MODULES[name])
    manifest = _in(made.manifest, tmp_path, made.cache, dtype)
    session = load(manifest, made.cache)
    reference, before = golden.make_reference(session, 8), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            golden.check(session, reference, *manifest.golden.tolerance)
    finally:
        torch.set_num_threads(before)
    changed, of = replace_weights(session.module)  # type: ignore[attr-defined]
    assert changed == of > 0
    with pytest.raises(GoldenMismatch):
        golden.check(session, reference, *manifest.golden.tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "conv_net", "transformer_block"])
def test_another_engine_matches(tmp_path: Path, name: str) -> None:
    """What torch recorded onnxruntime answers, within the tolerance of float32."""
    pytest.importorskip("onnxruntime")
    methods = pytest.importorskip("weighbridge.workers.compression.onnx_methods")
    made = original_artifact(tmp_path, getattr(compression, name)(), MODULES[name])
    built = methods.build(order(made, tmp_path / "made", "onnx"))
    path = built.files["model.onnx"]
    changes = {
        "files": (ArtifactFile(path="model.onnx", size=path.stat().st_size, digest=built.program.digest),),
        "program": built.program,
        "binding": built.binding,
        "engine": built.engine,
    }
    other = load(made.manifest.model_copy(update=changes), lambda _: path)
    golden.check(other, made.cache(made.manifest.golden.digest).read_bytes(), *made.manifest.golden.tolerance)


def test_other_weights_leave_the_file_alone(tmp_path: Path) -> None:
    """Within a budget, from the last layer; mapped bytes are not written; constants of a layer change too."""
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    mapped = module[0].weight.data
    assert replace_weights(module) == (6, 6)
    assert torch.equal(mapped, kept["0.weight"])
    assert not any(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    summed = nn.Linear(4, 1)
    before = summed.weight.sum().item()
    replace_weights(summed)
    assert summed.weight.sum().item() != pytest.approx(before, rel=0.1), "not only their places change"
    small = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first = small[0].weight.detach().clone()
    assert replace_weights(small, budget=4 * (8 + 2)) == (2, 4)
    assert torch.equal(small[0].weight, first)


def test_a_reference_is_of_numbers() -> None:
    """A class that a program masks with −inf is no damage; NaN and a row of nothing is."""

    class Masks:
        inputs, outputs = PIXELS, ()
        answer: Any = None

        def infer(self, inputs: Any) -> Any:
            return {"y": self.answer}

        def close(self) -> None: ...

    session = Masks()
    session.answer = np.array([[1.0, -np.inf], [2.0, -np.inf]])
    assert golden.make_reference(session, 2)
    for bad in (np.array([[np.nan, 1.0]]), np.array([[np.inf, 1.0]]), np.array([[-np.inf, -np.inf]])):
        session.answer = bad
        with pytest.raises(GoldenMismatch, match="not finite"):
            golden.make_reference(session, 1)
