"""Every tensor that lands is used or accounted for, in every dtype, from a template through validation to an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from weighbridge.engines import datatypes, purity, template
from weighbridge.engines.binding import Parameter, bind, ties, twins
from weighbridge.engines.errors import InvalidInput, TemplateError
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest, TensorSpec
from weighbridge.registry.recipe import ProgramWish
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.in_place import InPlace
from weighbridge.storage.pins import pin
from weighbridge.workers.bindings import Programs, TemplateInfo
from weighbridge.workers.outcome import Outcome
from weighbridge.workers.validate import ValidateTask, validate

IDS = TensorSpec(name="ids", datatype="INT64", shape=(-1, -1))
X = TensorSpec(name="x", datatype="FP32", shape=(-1, 4))


class Scale:
    """A program and a place to weigh checkpoints of it."""

    def __init__(self, root: Path, module: nn.Module, *specs: TensorSpec, **more: Any) -> None:
        self.drops, self.store = root / "bucket", root / "store"
        self.drops.mkdir()
        self.store.mkdir()
        self.blobs = Blobs(FolderStore(self.store))
        made = template.build(module, specs, **more)
        self.blobs.put_bytes(made.pt2)
        self.info = TemplateInfo("t", made.digest, made.fingerprint, made.parameters, made.inputs, made.outputs)

    def weigh(self, state: dict[str, torch.Tensor], **changes: Any) -> Outcome:
        path = self.drops / "a.safetensors"
        save_file({name: value.detach().clone().contiguous() for name, value in state.items()}, path)
        source = FolderStore(self.drops)
        files = tuple(pin(info) for info in source.list("a.safetensors"))
        task = ValidateTask("m", 1, "a.safetensors", files, programs=Programs((self.info,)))
        asked = replace(task, **{"program": ProgramWish(template="t"), **changes})
        return validate(asked, source=source, blobs=self.blobs, cache=self.path)

    def path(self, digest: str) -> Path:
        return InPlace(self.blobs).path(digest)

    def session(self, outcome: Outcome) -> Any:
        assert outcome.verdict == "passed", outcome.reason
        return load(Manifest.model_validate_json(self.blobs.get(outcome.facts["artifact_digest"])), self.path)


class Tied(nn.Module):
    """The head is the embedding; `other` has the same shape and is another thing."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.embed, self.head = nn.Embedding(12, 4), nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Any) -> Any:
        return self.head(torch.tanh(self.embed(ids) + 3 * self.other(ids)))


@pytest.mark.parametrize("kept", [("embed.weight",), ("head.weight",), ("embed.weight", "head.weight")])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_tied_program_takes_either_of_the_two_names(tmp_path: Path, kept: tuple[str, ...], prefix: str) -> None:
    """Whichever is in the file, and whichever of them an export reads, the answer is the module's."""
    torch.manual_seed(1)
    module = Tied()
    scale = Scale(tmp_path, module, IDS)
    state = {f"{prefix}{name}": module.state_dict()[name] for name in (*kept, "other.weight")}
    ids = np.array([[1, 5, 7], [0, 2, 11]])
    seen = scale.session(scale.weigh(state)).infer({"ids": ids})["output"]
    np.testing.assert_allclose(seen, module(torch.from_numpy(ids)).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_an_untied_checkpoint_of_a_tied_program_is_not_taken(tmp_path: Path) -> None:
    """One of the two would be ignored: both are named."""
    scale = Scale(tmp_path, Tied(), IDS)
    state = Tied().state_dict()
    state["head.weight"] = state["head.weight"] + torch.eye(12, 4) * 1e-6
    outcome = scale.weigh({f"module.{name}": value for name, value in state.items()})
    assert outcome.verdict == "needs_binding"
    assert "module.embed.weight and module.head.weight: one would be ignored" in outcome.reason


def test_three_that_are_one_must_be_one() -> None:
    """Each pair is compared; who is absent takes the tensor of who is there."""
    one, other = Parameter(shape=(2,), dtype="F32"), Parameter(shape=(2,), dtype="F32", tied="a")
    parameters = {"a": one, "b": other, "c": other}
    assert twins(bind({"a": one, "b": one, "c": one}, parameters), parameters) == [("a", "b"), ("a", "c")]
    assert ties(bind({"b": one}, parameters), parameters) == {"a": "b", "c": "b"}


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        return self.fc(x)


def test_a_parameter_that_is_never_read_is_named(tmp_path: Path) -> None:
    """At `template add` it is refused unless its operator says so; then each version says which tensors it ignores."""
    with pytest.raises(TemplateError, match=r"never reads aux.weight.*--unread"):
        template.build(Auxiliary(), [X])
    scale = Scale(tmp_path, Auxiliary(), X, unread=["aux.*"])
    assert scale.weigh(Auxiliary().state_dict()).facts["unread"] == ["aux.bias", "aux.weight"]


class Positions(nn.Module):
    """Sine positions from a float32 constant; attention; as precise as its positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50)
        self.register_buffer("rates", 10000.0 ** (-torch.arange(0, 32, 2).float() / 32), persistent=False)

    def forward(self, ids: Any) -> Any:
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.rates
        x = self.embed(ids) + torch.cat((angles.sin(), angles.cos()), -1)
        return self.head(functional.scaled_dot_product_attention(self.query(x), x, x, is_causal=True) + x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_how_weights_are_stored_is_not_how_a_program_computes(tmp_path: Path, dtype: torch.dtype) -> None:
    """A float32 program answers as itself with these (rounded) weights, at any length; the facts say both dtypes."""
    torch.manual_seed(0)
    module = Positions()
    scale = Scale(tmp_path, module, IDS)
    state = {name: value.to(dtype) for name, value in module.state_dict().items()}
    outcome = scale.weigh(state)
    module.load_state_dict({name: value.float() for name, value in state.items()})
    ids = np.random.default_rng(0).integers(0, 50, (1, 1500))
    seen, wanted = scale.session(outcome).infer({"ids": ids})["output"], module(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-4)
    assert outcome.facts["precision"]["computed"] == ["F32"]
    assert outcome.facts["precision"]["stored"] == [datatypes.to_safetensors(datatypes.from_torch(dtype))]


def test_large_inputs_of_half_weights_do_not_overflow(tmp_path: Path) -> None:
    """Inputs keep their dtype: 1e5 is no number in fp16."""
    scale = Scale(tmp_path, nn.Linear(4, 3), X)
    session = scale.session(scale.weigh({name: value.half() for name, value in nn.Linear(4, 3).state_dict().items()}))
    assert np.isfinite(session.infer({"x": np.full((1, 4), 1e5, np.float32)})["output"]).all()


class Through(nn.Module):
    """Gives back what it got, and a weight so that there is one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)

    def forward(self, x: Any) -> Any:
        return {"same": x.clone(), "weight": self.w.expand(x.shape[0], 1).clone()}


@pytest.mark.parametrize("datatype", [name for name in datatypes.NAMES if name != datatypes.BYTES])
def test_every_datatype_goes_the_whole_way(tmp_path: Path, datatype: str) -> None:
    """As an input, as an output and as a weight: template, validation, golden, inference."""
    module = Through(datatypes.to_torch(datatype))
    scale = Scale(tmp_path, module, TensorSpec(name="x", datatype=datatype, shape=(-1, 3)))
    session = scale.session(scale.weigh(module.state_dict()))
    x = np.array([[0, 1, 1], [1, 0, 1]]).astype(datatypes.to_numpy(datatype))
    answers = session.infer({"x": x})
    assert answers["same"].dtype == answers["weight"].dtype == x.dtype
    np.testing.assert_array_equal(answers["same"], x)


def test_bytes_are_refused_clearly() -> None:
    """No program of ours takes text."""
    with pytest.raises(TemplateError, match="input x: a program takes no BYTES"):
        template.build(nn.Linear(4, 3), [TensorSpec(name="x", datatype="BYTES", shape=(-1, 4))])


class Masked(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(size))

    def forward(self, ids: Any) -> Any:
        x, n = self.embed(ids), ids.shape[1]
        return (x @ x.transpose(1, 2) + self.mask[:n, :n]).softmax(-1) @ x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_of_the_operators_own_program_are_no_damage(tmp_path: Path, dtype: torch.dtype) -> None:
    """The causal mask at its place passes; an infinity elsewhere, another sign, or NaN is damage."""
    scale = Scale(tmp_path, Masked(), IDS)
    state = {name: value.to(dtype) for name, value in Masked().state_dict().items()}
    assert scale.weigh(state).verdict == "passed"
    for place, value in (((3, 1), -torch.inf), ((1, 3), torch.inf), ((1, 3), torch.nan), ((1, 3), 0.0)):
        wrong = state["mask"].clone()
        wrong[place] = value
        outcome = scale.weigh(state | {"mask": wrong})
        assert (outcome.verdict, "mask has" in outcome.reason) == ("rejected", True)
    wrong = state["embed.weight"].clone()
    wrong[0, 0] = -torch.inf
    outcome = scale.weigh(state | {"embed.weight": wrong})
    assert outcome.reason == "embed.weight has 1 non-finite value of 400 (NaN or Inf)"


class Average(nn.Module):
    """Keeps a running mean, as no program may."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Any) -> Any:
        self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return self.fc(x - self.mean)


def test_a_template_from_before_is_asked_with_the_real_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old templates were never tried; the weights' own validation is."""
    with monkeypatch.context() as patched:
        patched.setattr(purity, "ask", lambda *_: None)
        patched.setattr(purity, "ask_rows", lambda *_: None)
        scale = Scale(tmp_path, Average(), X)
    outcome = scale.weigh(Average().state_dict())
    assert (outcome.verdict, outcome.reason.split(":")[1]) == ("rejected", "t is no pure function")
    assert "changes mean" in outcome.reason


def test_a_template_without_a_contract_says_so(tmp_path: Path) -> None:
    """It goes on working; adding it again would bound its lengths and values."""
    scale = Scale(tmp_path, Tied(), IDS)
    scale.info = replace(scale.info, inputs=(IDS,))
    (note,) = scale.weigh(Tied().state_dict()).facts["notes"]
    assert "no contract (lengths and values of ids): add it again" in note


class Named(nn.Module):
    """A factory's: two outputs by key, a vocabulary, and positions that end."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(50, 8), nn.Embedding(20, 8)

    def forward(self, ids: Any, mask: Any) -> Any:
        if ids.shape[1] > 12:
            ids, mask = ids[:, -12:], mask[:, -12:]
        x = (self.embed(ids) + self.places(torch.arange(ids.shape[1]))) * mask[..., None]
        return {"first": x[:, 0], "sum": x.sum(1)}


def test_a_factory_binds_by_name_and_has_a_contract(tmp_path: Path) -> None:
    """The recipe's inputs and outputs in any order; values are bounded, and the module's own branch bounds nothing."""
    scale = Scale(tmp_path, Named(), IDS, replace_name(IDS, "mask"))
    factory = f"{__name__}:Named"
    outputs = tuple(TensorSpec(name=name, datatype="FP32", shape=(-1, 8)) for name in ("sum", "first"))
    module = Named()
    outcome = scale.weigh(
        module.state_dict(),
        program=ProgramWish(factory=factory),
        inputs=(replace_name(IDS, "mask"), IDS),
        outputs=outputs,
        programs=Programs((), ("factory:*",)),
    )
    assert outcome.verdict == "passed", outcome.reason
    manifest = Manifest.model_validate_json(scale.blobs.get(outcome.facts["artifact_digest"]))
    session = load(manifest, scale.path, factories=["*"])
    ids, mask = np.random.default_rng(0).integers(0, 50, (2, 30)), np.ones((2, 30), np.int64)
    wanted = module(torch.from_numpy(ids), torch.from_numpy(mask))
    for name, value in session.infer({"mask": mask, "ids": ids}).items():
        np.testing.assert_allclose(value, wanted[name].detach().numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidInput, match="input ids: values must be from 0 to 49, not"):
        session.infer({"mask": mask, "ids": ids + 50})
    with pytest.raises(InvalidInput, match="input mask: axis 1 must be 30 long"):
        session.infer({"mask": mask[:, :5], "ids": ids})


def test_a_factory_whose_names_are_others_is_not_bound(tmp_path: Path) -> None:
    """Unknown inputs and outputs are refused with those that exist."""
    scale = Scale(tmp_path, Named(), IDS, replace_name(IDS, "mask"))
    for inputs, output, said in (
        ((IDS, replace_name(IDS, "masque")), "sum", r"takes ids, mask; there is no input masque"),
        ((IDS, replace_name(IDS, "mask")), "total", "returns first, sum; there is no output total"),
    ):
        outcome = scale.weigh(
            Named().state_dict(),
            program=ProgramWish(factory=f"{__name__}:Named"),
            inputs=inputs,
            outputs=(TensorSpec(name=output, datatype="FP32", shape=(-1, 8)),),
            programs=Programs((), ("factory:*",)),
        )
        assert (outcome.verdict, said in outcome.reason) == ("needs_binding", True), outcome.reason


def replace_name(spec: TensorSpec, name: str) -> TensorSpec:
    return spec.model_copy(update={"name": name})
