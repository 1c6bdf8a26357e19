"""The contract of a program: what an export assumed is kept, found by trial, and enforced on every request."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from weighbridge.engines import template, tensors
from weighbridge.engines.errors import InvalidInput, TemplateError
from weighbridge.engines.manifest import (
    ArtifactFile,
    Golden,
    Length,
    Manifest,
    Program,
    TensorSpec,
    Term,
    Values,
)

IDS = TensorSpec(name="ids", datatype="INT64", shape=(-1, -1))


def floats(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=shape)


class Small(nn.Module):
    """A module of one function, with an embedding of 50 tokens, one of 20 positions and a table of 32."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 8), nn.Embedding(20, 8)
        self.table = nn.Parameter(torch.randn(32, 8))
        vars(self)["forward"] = forward.__get__(self)


def build(forward: Any, *specs: TensorSpec, **more: Any) -> template.Template:
    torch.manual_seed(0)
    return template.build(Small(forward), specs, unread=["*"], **more)


def last_twelve(self: Any, ids: Any) -> Any:
    if ids.shape[1] > 12:
        ids = ids[:, -12:]
    return self.tokens(ids).mean(1)


def pairs(self: Any, x: Any) -> Any:
    return x.view(x.shape[0], x.shape[1] // 2, 2).sum(2)


def parity(self: Any, x: Any) -> Any:
    return x * 2 if x.shape[1] % 2 == 0 else x * 3


def sliced_table(self: Any, ids: Any) -> Any:
    return self.tokens(ids) + self.table[: ids.shape[1]]


def positions(self: Any, ids: Any) -> Any:
    return self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))


def relative(self: Any, ids: Any) -> Any:
    at = torch.arange(ids.shape[1])
    x = self.tokens(ids)
    return x @ x.transpose(1, 2) + self.places(at[None] - at[:, None] + 10).sum(-1)


def counted(self: Any, ids: Any) -> Any:
    mask = ids.ne(1).int()
    return self.tokens(ids) + self.places((torch.cumsum(mask, 1) * mask).long() + 1)


def sixteen_wide(self: Any, x: Any) -> Any:
    return functional.linear(x, torch.ones(2, 16))


def convolved(self: Any, x: Any) -> Any:
    return functional.conv1d(x[:, None], torch.ones(1, 1, 5)).sum(-1)


@pytest.mark.parametrize(
    ("forward", "spec", "rule"),
    [
        (last_twelve, IDS, Length(axis=1, maximum=12)),
        (sliced_table, IDS, Length(axis=1, maximum=32)),
        (positions, IDS, Length(axis=1, maximum=20)),
        (relative, IDS, Length(axis=1, maximum=10)),
        (counted, IDS, Length(axis=1, maximum=18)),
        (pairs, floats("x", -1, -1), Length(axis=1, minimum=2, step=2)),
        (parity, floats("x", -1, -1), Length(axis=1, minimum=2, step=2)),
        (sixteen_wide, floats("x", -1, -1), Length(axis=1, minimum=16, maximum=16)),
        (convolved, floats("x", -1, -1), Length(axis=1, minimum=5)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_lengths_that_an_export_is_for_are_kept(forward: Any, spec: TensorSpec, rule: Length) -> None:
    """A branch, a table's end, a multiple, a constant, a kernel's width: each is a rule of the free axis."""
    assert build(forward, spec).inputs[0].lengths == (rule,)


def test_a_bound_that_is_the_branchs_and_not_the_programs_is_said() -> None:
    """forward() goes on where the export ends: the note names the condition and the line."""
    (note,) = build(last_twelve, IDS).notes
    assert all(part in note for part in ("forward() takes 13 too", "<= 12", "test_contract.py:"))
    assert build(sliced_table, IDS).notes == ()


def test_a_free_length_with_one_path_of_its_own_is_refused() -> None:
    """A length that the exporter took for a constant, though forward() takes others, is no free length."""

    def eight(self: Any, x: Any) -> Any:
        return x * 2 if x.shape[1] == 8 else x * 3

    with pytest.raises(
        TemplateError, match=r"exported program answers otherwise than forward.* != 8 \(test_contract.py:"
    ):
        build(eight, floats("x", -1, -1))


def test_a_bounded_batch_is_refused() -> None:
    """The batch is whatever requests make it."""

    def few(self: Any, x: Any) -> Any:
        return x * 2 if x.shape[0] <= 4 else x * 3

    with pytest.raises(TemplateError, match=r"generated guard .* <= 4"):
        build(few, floats("x", -1, 4))


def test_a_decision_on_values_is_refused_with_its_line() -> None:
    """An export would keep one of two answers."""

    def decides(self: Any, x: Any) -> Any:
        return x * 2 if x.sum() > 0 else x * 3

    with pytest.raises(
        TemplateError, match=r"decides on the values of its inputs.*test_contract.py:\d+: return x \* 2"
    ):
        build(decides, floats("x", -1, 4))


def test_lengths_that_belong_together_are_kept_together() -> None:
    """Equal, twice as long, and a sum of two; what is independent stays so."""

    def masked(self: Any, ids: Any, mask: Any) -> Any:
        return (self.tokens(ids) * mask.unsqueeze(-1)).sum(1)

    def twice(self: Any, ids: Any, mask: Any) -> Any:
        return (torch.cat([ids, ids], 1) * mask).sum(1)

    def apart(self: Any, ids: Any, mask: Any) -> Any:
        return ids.sum(1) + mask.sum(1)

    def past(self: Any, ids: Any, before: Any, mask: Any) -> Any:
        return torch.cat([before, ids], 1) * mask

    mask = floats("mask", -1, -1)
    of = Term(input="ids", axis=1)
    assert build(masked, IDS, mask).inputs[1].lengths == (Length(axis=1, of=(of,)),)
    assert build(twice, IDS, mask).inputs[1].lengths == (Length(axis=1, of=(Term(input="ids", axis=1, times=2),)),)
    assert build(apart, IDS, mask).inputs[1].lengths == (Length(axis=1),)
    rule = build(past, IDS, floats("before", -1, -1), mask).inputs[2].lengths[0]
    assert sorted(term.input for term in rule.of) == ["before", "ids"]


def columns(self: Any, ids: Any) -> Any:
    return self.tokens(ids[:, 0]) + self.places(ids[:, 1])


def offsets(self: Any, ids: Any) -> Any:
    return self.tokens(ids + torch.tensor([0, 30])).sum(1)


def ignored(self: Any, ids: Any) -> Any:
    return self.tokens(torch.where(ids == -100, 0, ids)).sum(1)


def clamped(self: Any, ids: Any) -> Any:
    return self.tokens(ids.clamp(0, 49)).sum(1)


def one_hot(self: Any, ids: Any) -> Any:
    return functional.one_hot(ids, 7).float()


def wraps(self: Any, ids: Any) -> Any:
    return self.table[ids]


def shifted(self: Any, ids: Any) -> Any:
    return self.tokens(ids + 1).sum(1)


def scattered(self: Any, ids: Any) -> Any:
    return torch.zeros(ids.shape[0], 6).scatter(1, ids, 1.0)


@pytest.mark.parametrize(
    ("forward", "spec", "values"),
    [
        (positions, IDS, Values(minimum=(0,), maximum=(49,))),
        (columns, IDS.model_copy(update={"shape": (-1, 2)}), Values(minimum=(0,), maximum=(49, 19))),
        (offsets, IDS.model_copy(update={"shape": (-1, 2)}), Values(minimum=(0, -30), maximum=(49, 19))),
        (ignored, IDS, Values(minimum=(0,), maximum=(49,), also=(-100,))),
        (clamped, IDS, None),
        (one_hot, IDS, Values(minimum=(0,), maximum=(6,))),
        (wraps, IDS, Values(minimum=(-32,), maximum=(31,))),
        (shifted, IDS, Values(minimum=(-1,), maximum=(48,))),
        (scattered, IDS.model_copy(update={"shape": (-1, 3)}), Values(minimum=(0,), maximum=(5,))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_values_that_index_are_bounded(forward: Any, spec: TensorSpec, values: Values | None) -> None:
    """Rows of an embedding, columns each with their own, offsets, clamps, negative indices, ignored labels."""
    assert build(forward, spec).inputs[0].values == values


def test_positions_are_bounded_by_the_length_that_they_point_into() -> None:
    """`last` of a sequence: the bound moves with the sequence."""

    def at_last(self: Any, ids: Any, last: Any) -> Any:
        return self.tokens(ids).gather(1, last[:, None, None].expand(-1, 1, 8)).squeeze(1)

    specs = build(at_last, IDS, TensorSpec(name="last", datatype="INT64", shape=(-1,))).inputs
    assert specs[1].values == Values(minimum=(0,), below=Term(input="ids", axis=1))
    ids = np.ones((2, 5), np.int64)
    tensors.check_inputs({"ids": ids, "last": np.array([0, 4])}, specs)
    with pytest.raises(InvalidInput, match=r"input last: values must be from 0 to 4, not 5 \(at \[1\]\)"):
        tensors.check_inputs({"ids": ids, "last": np.array([0, 5])}, specs)


CONTRACT = (
    IDS.model_copy(
        update={
            "lengths": (Length(axis=1, minimum=2, maximum=12, step=2),),
            "values": Values(minimum=(0,), maximum=(49,), also=(-100,)),
        }
    ),
    TensorSpec(
        name="mask",
        datatype="INT64",
        shape=(-1, -1),
        lengths=(Length(axis=1, of=(Term(input="ids", axis=1),), plus=1),),
    ),
)


@pytest.mark.parametrize(
    ("ids", "mask", "said"),
    [
        (np.zeros((1, 14), np.int64), 15, "input ids: axis 1 must be at most 12 long, not 14"),
        (np.zeros((1, 1), np.int64), 2, "input ids: axis 1 must be at least 2 long, not 1"),
        (np.zeros((1, 0), np.int64), 1, "input ids: axis 1 must be at least 2 long, not 0"),
        (np.zeros((1, 5), np.int64), 6, "input ids: axis 1 must be 2, 4, 6 … long, not 5"),
        (np.zeros((1, 4), np.int64), 4, r"input mask: axis 1 must be 5 long \(axis 1 of ids \+ 1\), not 4"),
        (np.full((1, 4), 50), 5, r"input ids: values must be from 0 to 49 or -100, not 50 \(at \[0, 0\]\)"),
        (np.array([[0, -100, 3, -1]]), 5, r"not -1 \(at \[0, 3\]\)"),
        (np.full((1, 4), 2**62), 5, "values must be from 0 to 49"),
    ],
)
def test_what_breaks_the_contract_names_the_bound_and_the_value(ids: Any, mask: int, said: str) -> None:
    """The message is what a client reads in a 400."""
    with pytest.raises(InvalidInput, match=said):
        tensors.check_inputs({"ids": ids, "mask": np.zeros((1, mask), np.int64)}, CONTRACT)


def test_what_keeps_the_contract_passes_and_is_what_synthetic_inputs_are() -> None:
    """Also the odd value that the program gives a meaning; a golden covers the whole vocabulary."""
    ids = np.array([[0, 49, -100, 7]])
    tensors.check_inputs({"ids": ids, "mask": np.zeros((1, 5), np.int64)}, CONTRACT)
    made = tensors.synthetic(CONTRACT, size=64, seed=0)
    tensors.check_inputs(made, CONTRACT)
    assert made["ids"].max() > 40
    assert made["mask"].shape == (64, 9)


def test_a_spec_without_rules_is_written_as_it_always_was() -> None:
    """Manifests from before there were contracts keep their digests."""
    assert floats("x", -1, 4).model_dump(mode="json") == {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
    for spec in CONTRACT:
        assert TensorSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_a_manifest_without_a_contract_keeps_its_digest() -> None:
    """What was named before there were contracts is named so still."""
    manifest = Manifest(
        variant="original",
        files=(ArtifactFile(path="a.safetensors", size=3, digest="a" * 64),),
        program=Program(kind="template", name="t", digest="b" * 64),
        binding={"w": "w"},
        inputs=(floats("x", -1, 4),),
        outputs=(floats("y", -1, 3),),
        golden=Golden(digest="c" * 64, size=5, rtol=1e-4, atol=1e-5),
    )
    assert manifest.digest == "cadcb65e5b9c9ad50e10763048ba607fa77b56da878266599f36f6a8a198c1d0"
    assert Manifest.model_validate_json(manifest.canonical()) == manifest
