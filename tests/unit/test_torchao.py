"""The torch methods: what they promise, what they keep, and that their files load to the same numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from fixtures import compression
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from weighbridge.engines import golden, tensors, torchao_format
from weighbridge.engines.errors import LoadError
from weighbridge.engines.load import load
from weighbridge.engines.manifest import ArtifactFile, Encoding, Manifest, Program
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression import casting, report, torchao_methods
from weighbridge.workers.compression.types import Built, NotApplicable, Original

TORCHAO = ("int8-weight-only", "int4-weight-only", "int8-dynamic", "fp8-weight-only")


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return compression.original_artifact(tmp_path_factory.mktemp("mlp"), compression.mlp(), compression.PIXELS)


def _build(original: Original, folder: Path, method: str, **wish: Any) -> Built:
    module = casting if method in ("bf16", "fp16") else torchao_methods
    return module.build(compression.order(original, folder, method, **wish))


def _rows(built: Built) -> dict[str, VariantTensor]:
    return {row.name: row for row in built.tensors}


def _manifest(original: Original, built: Built) -> tuple[Manifest, Any]:
    (path,) = built.files.values()
    digest = blake3(path.read_bytes()).hexdigest()
    file = ArtifactFile(path="model.safetensors", size=path.stat().st_size, digest=digest)
    manifest = original.manifest.model_copy(
        update={"files": (file,), "engine": built.engine, "encoding": built.encoding}
    )
    return manifest, lambda wanted: path if wanted == digest else original.cache(wanted)


def _answers(manifest: Manifest, cache: Any) -> Any:
    session = load(manifest, cache)
    answers = session.infer(tensors.synthetic(session.inputs, size=32, seed=5))["output"]
    session.close()
    return answers


@pytest.mark.parametrize(
    ("method", "ratio", "noise", "decibels"),
    [
        ("bf16", 0.501, 0.02, 50),
        ("fp16", 0.501, 0.002, 70),
        ("int8-weight-only", 0.272, 0.02, 40),
        ("int8-dynamic", 0.272, 0.04, 40),
        ("int4-weight-only", 0.174, 0.2, 20),
        ("fp8-weight-only", 0.27, 0.06, 28),
    ],
)
def test_a_variant_is_as_small_as_promised_and_near_the_original(
    mlp: Original, tmp_path: Path, method: str, ratio: float, noise: float, decibels: float
) -> None:
    """Its file has the promised bytes, each changed weight says its noise, and answers differ by little."""
    built = _build(mlp, tmp_path / "out", method)
    (path,) = built.files.values()
    with safe_open(path, "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    before = sum(row.bytes_in for row in built.tensors)
    assert built.promised_ratio <= ratio
    assert stored == sum(row.bytes_out for row in built.tensors) == pytest.approx(built.promised_ratio * before)
    assert _rows(built).keys() == mlp.manifest.binding.keys()
    changed = [row for row in built.tensors if row.action != report.KEPT]
    assert {row.name for row in changed} >= {"0.weight", "2.weight", "4.weight"}
    assert all(row.sqnr is not None and row.sqnr > decibels for row in changed)
    expected = _answers(mlp.manifest, mlp.cache)
    seen = _answers(*_manifest(mlp, built))
    error = np.linalg.norm(seen - expected) / np.linalg.norm(expected)
    assert 0 < error < noise


@pytest.mark.parametrize("method", TORCHAO)
def test_files_stand_for_exactly_the_tensors_that_were_quantized(mlp: Original, tmp_path: Path, method: str) -> None:
    """Written, read and written again, a file is the same, byte for byte."""
    built = _build(mlp, tmp_path / "out", method)
    (path,) = built.files.values()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    parts = load_file(path)
    again, said = torchao_format.flatten(torchao_format.unflatten(parts, metadata))
    assert said == metadata
    assert again.keys() == parts.keys()
    assert all(torch.equal(again[name].view(torch.uint8), parts[name].view(torch.uint8)) for name in parts)


def test_int4_values_are_packed_by_two_without_loss() -> None:
    """Odd widths too, and every value from -8 to 7."""
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(3)[:45].reshape(5, 9)
    packed = torchao_format._pack(values)
    assert packed.shape == (5, 5)
    assert torch.equal(torchao_format._unpack(packed, 9), values)


@pytest.mark.slow
@pytest.mark.slow
def test_another_process_gives_the_same_bytes(mlp: Original, tmp_path: Path) -> None:
    """A host's answers are those of the worker that built the variant, bit for bit."""
    built = _build(mlp, tmp_path / "out", "int4-weight-only")
    manifest, cache = _manifest(mlp, built)
    blobs = compression.blobs_in(tmp_path / "blobs")
    for digest in manifest.blobs():
        if digest != manifest.golden.digest:
            blobs.put_file(cache(digest))
    stored = blobs.put_bytes(manifest.canonical())
    session = load(manifest, cache)
    expected = blake3(golden.make_reference(session)).hexdigest()
    script = f"""
from pathlib import Path
from blake3 import blake3
from weighbridge.engines import golden
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest
folder = Path({str(tmp_path / "blobs")!r})
at = lambda digest: folder / "blobs" / digest[:2] / digest
manifest = Manifest.model_validate_json(at({stored.digest!r}).read_bytes())
print(blake3(golden.make_reference(load(manifest, at))).hexdigest())
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == expected


def test_layers_that_stay_are_named_with_the_reason(tmp_path: Path, mlp: Original) -> None:
    """Skipped by the recipe, or columns that the group does not divide: the others are quantized."""
    rows = _rows(_build(mlp, tmp_path / "skip", "int8-weight-only", skip=["4", "0.w*"]))
    assert rows["4.weight"].reason == "skipped by 4"
    assert rows["0.weight"].reason == "skipped by 0.w*"
    assert rows["2.weight"].action != report.KEPT
    rows = _rows(_build(mlp, tmp_path / "group", "int4-weight-only", group=128))
    assert rows["0.weight"].reason == "64 columns do not divide into groups of 128"
    assert rows["2.weight"].action != report.KEPT


def test_no_layer_that_fits_is_not_applicable_and_says_why(tmp_path: Path, mlp: Original) -> None:
    """Never a variant that is the original under another name."""
    with pytest.raises(NotApplicable, match="0: 64 columns do not divide into groups of 48"):
        _build(mlp, tmp_path / "a", "int4-weight-only", group=48)
    with pytest.raises(NotApplicable, match=r"needs CUDA of capability 8\.9"):
        _build(mlp, tmp_path / "b", "fp8-dynamic")
    flat = nn.Sequential(nn.Conv1d(64, 4, 1), nn.Flatten())
    inputs = (compression.PIXELS[0].model_copy(update={"shape": (-1, 64, 2)}),)
    bare = compression.original_artifact(tmp_path / "blobs", flat, inputs)
    with pytest.raises(NotApplicable, match="no linear layer"):
        _build(bare, tmp_path / "c", "int8-weight-only")


def attention() -> nn.Module:
    """torch's own attention, whose output layer is no ordinary linear one."""
    torch.manual_seed(0)
    return Attention().eval()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(64, 4, batch_first=True), nn.Linear(64, 64)

    def forward(self, states: Any) -> Any:
        return self.head(self.attention(states, states, states, need_weights=False)[0])


def test_a_factorys_own_layers_are_quantized(tmp_path: Path) -> None:
    """Also without an export; what torchao cannot take of attention is kept and named."""
    model = attention()
    exported = compression.original_artifact(tmp_path / "blobs", model, compression.STATES)
    program = Program(kind="factory", name=f"{__name__}:attention")
    manifest = exported.manifest.model_copy(update={"program": program})
    original = replace(exported, manifest=manifest, factories=(program.name,))
    built = _build(original, tmp_path / "out", "int8-weight-only")
    rows = _rows(built)
    assert rows["head.weight"].action != report.KEPT
    assert rows["attention.out_proj.weight"].reason == "the attention around it reads its weight directly"
    made, cache = _manifest(original, built)
    session = load(made, cache, factories=original.factories)
    inputs = tensors.synthetic(session.inputs, size=2, seed=1)
    expected = load(manifest, original.cache, factories=original.factories).infer(inputs)["output"]
    np.testing.assert_allclose(session.infer(inputs)["output"], expected, atol=0.02)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """A head that is the embedding is neither untied nor stored twice."""
    model = compression.tied_language_model()
    original = compression.original_artifact(tmp_path / "blobs", model, compression.TOKENS)
    built = _build(original, tmp_path / "out", "int8-weight-only")
    rows = _rows(built)
    assert rows["embedding.weight"].reason == "tied to lm_head.weight: quantizing it would untie them"
    assert rows.keys() == {"embedding.weight", "body.weight", "body.bias"}
    manifest, cache = _manifest(original, built)
    session = load(manifest, cache)
    state = session.module.state_dict(keep_vars=True)  # type: ignore[attr-defined]
    assert state["embedding.weight"].data_ptr() == state["lm_head.weight"].data_ptr()


def test_what_fp16_cannot_hold_is_kept_and_named(tmp_path: Path) -> None:
    """The variant runs in float32 then, and says so."""
    model = compression.mlp()
    state = dict(model.state_dict()) | {"4.bias": torch.full((10,), 1e6)}
    original = compression.original_artifact(tmp_path / "blobs", model, compression.PIXELS, state)
    built = _build(original, tmp_path / "out", "fp16")
    assert _rows(built)["4.bias"].reason == "fp16 holds up to 65504, it has 1e+06"
    assert "4.bias" in built.notes[0]
    assert np.isfinite(_answers(*_manifest(original, built))).all()
    with pytest.raises(NotApplicable, match="no tensor would change"):
        _build(original, tmp_path / "none", "bf16", skip=["*"])


@pytest.mark.parametrize("computes", ["F32", "BF16"])
def test_bf16_weights_quantize_in_the_dtype_of_their_program(tmp_path: Path, computes: str) -> None:
    """How weights are stored is not how a program computes: a float32 program goes on in float32."""
    model, inputs = compression.mlp(), compression.PIXELS
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    if computes == "BF16":
        model = model.bfloat16()
        inputs = tuple(spec.model_copy(update={"datatype": "BF16"}) for spec in inputs)
    original = compression.original_artifact(tmp_path / "blobs", model, inputs, state)
    built = _build(original, tmp_path / "out", "int8-weight-only")
    assert built.compute_dtypes == (computes,)
    expected = _answers(original.manifest, original.cache)
    seen = _answers(*_manifest(original, built))
    np.testing.assert_allclose(seen.astype(np.float32), expected.astype(np.float32), atol=0.03)


def test_encodings_that_are_not_known_are_refused(tmp_path: Path, mlp: Original) -> None:
    """Another torchao, another device or a detail of a later version: the message names both sides."""
    built = _build(mlp, tmp_path / "out", "int8-weight-only")
    manifest, cache = _manifest(mlp, built)

    def loaded(**details: str) -> None:
        load(manifest.model_copy(update={"encoding": Encoding(kind="torchao", details=details)}), cache)

    with pytest.raises(LoadError, match=rf"made by torchao 0\.1; this machine has {torchao_format.minor()}"):
        loaded(torchao="0.1")
    with pytest.raises(LoadError, match="says colour, which this version does not know"):
        loaded(torchao=torchao_format.minor(), colour="red")
    with pytest.raises(LoadError, match="layout is for cuda; this device is cpu"):
        loaded(torchao=torchao_format.minor(), device="cuda")
    with pytest.raises(LoadError, match="must name the torchao"):
        loaded()
    with pytest.raises(LoadError, match="metadata"):
        load(replace_files(manifest, mlp), mlp.cache)


def replace_files(manifest: Manifest, original: Original) -> Manifest:
    """The original's plain weights under an encoding that they have not."""
    return manifest.model_copy(update={"files": original.manifest.files})


def test_sqnr_is_the_formula() -> None:
    """10 · log10 of signal over noise; none for what is exact, empty, zero or an integer."""
    x = torch.tensor([3.0, 4.0])
    assert report.sqnr(x, x + torch.tensor([0.0, 0.5])) == pytest.approx(20.0)
    assert report.sqnr(x, x) is None
    assert report.sqnr(torch.zeros(2), x) is None
    assert report.sqnr(torch.tensor([1]), torch.tensor([2])) is None
    assert report.sqnr(torch.empty(0), torch.empty(0)) is None
