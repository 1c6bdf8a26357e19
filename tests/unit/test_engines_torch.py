"""The torch engine and its templates: what loads, answers as the module would; what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.engines import INPUTS, LocalBlobs, make_checkpoint, small_mlp, weights
from safetensors.numpy import save_file
from torch import nn

from weighbridge.engines import datatypes, golden, template
from weighbridge.engines.errors import EngineError, GoldenMismatch, InvalidInput, LoadError, TemplateError
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest, Program, TensorSpec

Make = Callable[..., Manifest]


def eager(pixels: np.ndarray[Any, Any], seed: int = 1) -> np.ndarray[Any, Any]:
    module = small_mlp()
    module.load_state_dict({n: datatypes.array_to_tensor(v) for n, v in weights(seed).items()})
    with torch.inference_mode():
        return datatypes.tensor_to_array(module(torch.from_numpy(pixels)))


def test_a_template_is_small_and_without_weights(digits_template: Any) -> None:
    """The file holds the graph and its constants, and knows its inputs, outputs and parameters."""
    assert len(digits_template.pt2) < 50_000
    assert digits_template.outputs == (TensorSpec(name="logits", datatype="FP32", shape=(-1, 10)),)
    assert digits_template.parameters.keys() == weights().keys()
    assert "scale" not in digits_template.parameters


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_bound_weights_answer_as_the_module(
    tmp_path: Path, make_manifest: Make, local_blobs: LocalBlobs, prefix: str
) -> None:
    """Template + weights (also with DDP's and compile's names) equal the eager module at every batch size."""
    manifest = make_manifest(make_checkpoint(tmp_path / "c.safetensors", prefix=prefix))
    session = load(manifest, local_blobs)
    for size in (1, 2, 7):
        pixels = np.random.default_rng(size).standard_normal((size, 64)).astype(np.float32)
        np.testing.assert_allclose(session.infer({"pixels": pixels})["logits"], eager(pixels), rtol=1e-5, atol=1e-5)
    session.close()
    with pytest.raises(EngineError, match="closed"):
        session.infer({"pixels": pixels})


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_half_weights_take_float32_inputs(
    tmp_path: Path, make_manifest: Make, local_blobs: LocalBlobs, dtype: str
) -> None:
    """The weights are cast to the program's dtype, nothing else is; outputs come back in the declared one."""
    session = load(make_manifest(make_checkpoint(tmp_path / "c.safetensors", dtype=dtype)), local_blobs)
    pixels = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    logits = session.infer({"pixels": pixels})["logits"]
    assert logits.dtype == np.float32
    module = small_mlp()
    module.load_state_dict({n: datatypes.array_to_tensor(v).float() for n, v in weights(1, dtype).items()})
    with torch.inference_mode():
        np.testing.assert_allclose(logits, module(torch.from_numpy(pixels)).numpy(), rtol=1e-5, atol=1e-5)


class Fixed(nn.Module):
    """Says its dtypes inside: bf16 weights against an explicit float32; and keeps a float64 constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("fine", torch.full((2,), 1 / 3, dtype=torch.float64), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.fc(x.float()).double() + self.fine


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_program_that_fixes_its_dtypes_keeps_them(
    tmp_path: Path, make_manifest: Make, local_blobs: LocalBlobs, dtype: str
) -> None:
    """Half weights are cast to the program's dtype where it runs in no other; constants keep their precision."""
    module = Fixed()
    made = template.build(module, [TensorSpec(name="x", datatype="FP32", shape=(-1, 4))], ["y"])
    numpy_dtype = datatypes.to_numpy(datatypes.from_safetensors(dtype))
    state = {name: value.detach().numpy().astype(numpy_dtype) for name, value in module.state_dict().items()}
    save_file(state, tmp_path / "f.safetensors")
    manifest = make_manifest(make_checkpoint(tmp_path / "x.safetensors")).model_copy(
        update={
            "files": (manifest_file(tmp_path / "f.safetensors", local_blobs),),
            "program": Program(kind="template", name="f", digest=local_blobs.add(made.pt2)),
            "binding": {name: name for name in state},
            "inputs": made.inputs,
            "outputs": made.outputs,
        }
    )
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    seen = load(manifest, local_blobs).infer({"x": x})["y"]
    module.load_state_dict({name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()})
    np.testing.assert_allclose(seen, module(torch.from_numpy(x)).detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "rule"),
    [
        ({}, "missing input pixels"),
        ({"pixels": np.zeros((1, 64), np.float32), "x": np.zeros(1)}, "unknown input x"),
        ({"pixels": np.zeros((1, 64))}, "datatype must be FP32"),
        ({"pixels": np.zeros((1, 63), np.float32)}, "shape must be"),
        ({"pixels": np.zeros((0, 64), np.float32)}, "batch is empty"),
    ],
)
def test_inputs_that_break_the_contract(
    tmp_path: Path, make_manifest: Make, local_blobs: LocalBlobs, inputs: dict[str, Any], rule: str
) -> None:
    """The error names the input and the rule."""
    session = load(make_manifest(make_checkpoint(tmp_path / "c.safetensors")), local_blobs)
    with pytest.raises(InvalidInput, match=rule):
        session.infer(inputs)


def test_a_template_file_with_another_digest_is_not_opened(
    tmp_path: Path, make_manifest: Make, local_blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.export.load runs code: it never sees bytes that the registry did not record."""
    manifest = make_manifest(make_checkpoint(tmp_path / "c.safetensors"))
    local_blobs(manifest.program.digest or "").write_bytes(b"PK hostile")
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(LoadError, match="the registry recorded"):
        load(manifest, local_blobs)


def test_a_binding_that_does_not_fit_is_refused(tmp_path: Path, make_manifest: Make, local_blobs: LocalBlobs) -> None:
    """A manifest cannot swap parameters, nor bind files that hold something else."""
    manifest = make_manifest(make_checkpoint(tmp_path / "c.safetensors"))
    swapped = manifest.binding | {"norm.weight": "norm.bias", "norm.bias": "norm.weight"}
    with pytest.raises(LoadError, match="binding"):
        load(manifest.model_copy(update={"binding": swapped}), local_blobs)


def test_only_allowed_factories_run(tmp_path: Path, make_manifest: Make, local_blobs: LocalBlobs) -> None:
    """A factory is imported only when a pattern of the operator matches; a path never is."""
    manifest = make_manifest(make_checkpoint(tmp_path / "c.safetensors"))
    program = Program(kind="factory", name="fixtures.engines:small_mlp")
    manifest = manifest.model_copy(update={"program": program})
    with pytest.raises(LoadError, match="not allowed"):
        load(manifest, local_blobs, factories=["other.*:*"])
    session = load(manifest, local_blobs, factories=["fixtures.engines:*"])
    pixels = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(session.infer({"pixels": pixels})["logits"], eager(pixels), rtol=1e-5, atol=1e-5)
    sentinel = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\ndef f(): ...")
    evil = manifest.model_copy(update={"program": Program(kind="factory", name=f"{tmp_path}/evil.py:f")})
    with pytest.raises(LoadError, match="not allowed"):
        load(evil, local_blobs, factories=["*"])
    assert not sentinel.exists()


def test_golden_round_trip(tmp_path: Path, make_manifest: Make, local_blobs: LocalBlobs) -> None:
    """The same weights match their reference golden, other weights do not."""
    session = load(make_manifest(make_checkpoint(tmp_path / "a.safetensors")), local_blobs)
    other = load(make_manifest(make_checkpoint(tmp_path / "b.safetensors", seed=2)), local_blobs)
    reference = golden.make_reference(session, n=4, seed=0)
    assert reference == golden.make_reference(session, n=4, seed=0)
    golden.check(session, reference, *golden.TOLERANCES["FP32"])
    with pytest.raises(GoldenMismatch, match="output logits differs by up to") as caught:
        golden.check(other, reference, *golden.TOLERANCES["FP32"])
    assert caught.value.worst > 0


def test_meta_constants_cannot_become_a_template() -> None:
    """A constant on meta would load every key and answer wrong, silently."""
    module = small_mlp()
    module.shift = module.shift.to("meta")
    with pytest.raises(TemplateError, match="shift is on meta"):
        template.build(module, INPUTS, ["logits"])
    with pytest.raises(TemplateError, match="on meta"):
        template.build(small_mlp().to("meta"), INPUTS, ["logits"])


def test_tied_weights_may_be_left_out(tmp_path: Path, local_blobs: LocalBlobs, make_manifest: Make) -> None:
    """Two names of one storage: the template says so, and the file needs one of them."""
    from weighbridge.engines.binding import Parameter, bind

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Any) -> Any:
            return self.head(self.embed(ids)).mean(1)

    module = Tied()
    made = template.build(module, [TensorSpec(name="ids", datatype="INT64", shape=(-1, -1))], ["scores"])
    assert made.parameters["head.weight"].tied == "embed.weight"
    only = {"embed.weight": Parameter(shape=(12, 4), dtype="F32")}
    assert bind(only, made.parameters) == {"embed.weight": "embed.weight"}
    path = tmp_path / "t.safetensors"
    save_file({"embed.weight": module.embed.weight.detach().numpy()}, path)
    manifest = make_manifest(make_checkpoint(tmp_path / "x.safetensors")).model_copy(
        update={
            "files": (manifest_file(path, local_blobs),),
            "program": Program(kind="template", name="t", digest=local_blobs.add(made.pt2)),
            "binding": bind(only, made.parameters),
            "inputs": made.inputs,
            "outputs": made.outputs,
        }
    )
    ids = np.array([[1, 5, 7], [0, 2, 11]])
    expected = module(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(load(manifest, local_blobs).infer({"ids": ids})["scores"], expected, rtol=1e-5)


def manifest_file(path: Path, blobs: LocalBlobs) -> Any:
    from weighbridge.engines.manifest import ArtifactFile

    data = path.read_bytes()
    return ArtifactFile(path=path.name, size=len(data), digest=blobs.add(data))


def test_a_free_length_of_the_inputs_is_free_in_the_outputs() -> None:
    """What was recorded as the length of the example would break whoever believes it."""

    class Tagger(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens[..., None].float().expand(-1, -1, 3).contiguous()

    made = template.build(Tagger(), (TensorSpec(name="tokens", datatype="INT64", shape=(-1, -1)),))
    assert [spec.shape for spec in made.outputs] == [(-1, -1, 3)]
