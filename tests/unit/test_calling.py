"""Names bind by name: in any order, and what is unknown or missing is refused with the names that exist."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from weighbridge.engines import program, template
from weighbridge.engines.errors import TemplateError
from weighbridge.engines.manifest import TensorSpec


def spec(name: str) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=(-1, 4))


class Minus(nn.Module):
    """Two inputs of one shape and dtype, and an optional third between them."""

    def forward(self, left: Any, scale: Any = None, right: Any = None) -> Any:
        return (left - right) * (1 if scale is None else scale)


class Anything(nn.Module):
    def forward(self, *args: Any) -> Any:
        return args[0] - args[1]


Pair = namedtuple("Pair", "logits embedding")


@dataclass
class Record:
    logits: Any
    embedding: Any


class Heads(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def forward(self, x: Any) -> Any:
        return self._make(x * 2, x * 3)


def answer(module: nn.Module, made: template.Template, **inputs: float) -> dict[str, float]:
    """What the finished template gives for constant inputs."""
    loaded = program.read(made.pt2)
    loaded.load_state_dict(module.state_dict(), assign=True)
    results = loaded(*(torch.full((2, 4), inputs[one.name]) for one in made.inputs))
    return {one.name: float(value[0, 0]) for one, value in zip(made.outputs, results, strict=True)}


@pytest.mark.parametrize("names", [("left", "right"), ("right", "left"), ("right", "scale", "left")])
def test_inputs_bind_to_the_parameters_of_their_names(names: tuple[str, ...]) -> None:
    """Whatever the order they are given in, and over an optional parameter that is left out."""
    module = Minus()
    made = template.build(module, [spec(name) for name in names])
    assert answer(module, made, left=5.0, right=2.0, scale=1.0) == {"output": 3.0}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("left", "wrong"), r"Minus.forward\(\) takes left, scale.*; there is no input wrong"),
        (("right", "scale"), r"takes left, scale=None, right=None; the input left is missing"),
    ],
)
def test_unknown_and_missing_inputs_are_refused(names: tuple[str, ...], said: str) -> None:
    """The message names those that exist."""
    with pytest.raises(TemplateError, match=said):
        template.build(Minus(), [spec(name) for name in names])


def test_what_has_no_names_needs_consent() -> None:
    """forward(*args) could be given anything in any order."""
    with pytest.raises(TemplateError, match=r"forward\(\) takes \*args; there is no input a \(--positional"):
        template.build(Anything(), [spec("a"), spec("b")])
    made = template.build(Anything(), [spec("b"), spec("a")], positional=True)
    assert answer(Anything(), made, b=5.0, a=1.0) == {"output": 4.0}


def test_one_input_of_one_parameter_may_be_called_anything() -> None:
    """There is nothing to mix it up with; torch's own layers call it `input`."""
    assert template.build(nn.Linear(4, 3), [spec("pixels")], ["y"]).inputs == (spec("pixels"),)


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: {"logits": a, "embedding": b},
        Pair,
        Record,
    ],
    ids=["dict", "named tuple", "dataclass"],
)
@pytest.mark.parametrize("names", [("embedding", "logits"), ("logits", "embedding"), (), ("embedding",)])
def test_outputs_bind_to_their_keys(make: Any, names: tuple[str, ...]) -> None:
    """In any order, some of them, or all where none is named."""
    module = Heads(make)
    made = template.build(module, [spec("x")], names)
    seen = answer(module, made, x=1.0)
    assert seen == {name: {"logits": 2.0, "embedding": 3.0}[name] for name in names or ("logits", "embedding")}
    assert [one.name for one in made.outputs] == list(names or ("logits", "embedding"))


def test_nested_outputs_are_named_by_their_path() -> None:
    """The keys on the way, with dots; an element of a list by its number."""
    module = Heads(lambda a, b: {"heads": {"logits": a}, "hidden": [a, b]})
    made = template.build(module, [spec("x")], ["hidden.1", "heads.logits"])
    assert answer(module, made, x=1.0) == {"hidden.1": 3.0, "heads.logits": 2.0}


@pytest.mark.parametrize(
    ("make", "names", "said"),
    [
        (lambda a, b: {"logits": a, "embedding": b}, ("a", "b"), "returns logits, embedding; there is no output a"),
        (lambda a, b: (a, b), ("one",), "returns 2 values, named are one: name each"),
        (lambda a, b: (a, b), (), "returns 2 values, none is named"),
        (lambda a, _: (a, None), ("a", "past"), r"output past \(number 2\) is None"),
        (lambda a, _: {"a": a, "past": None}, (), r"output past \(number 2\) is None"),
        (lambda a, _: {"a": a, "loss": 0.5}, ("loss",), "output loss .* is a float"),
    ],
)
def test_outputs_that_are_not_there_are_refused(make: Any, names: tuple[str, ...], said: str) -> None:
    """Unknown names, names that do not suffice, None and what is no tensor: each says which."""
    with pytest.raises(TemplateError, match=said):
        template.build(Heads(make), [spec("x")], names)


def test_building_leaves_the_module_as_it_was() -> None:
    """Its forward, its weights and its buffers are the operator's."""
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    template.build(module, [spec("x")])
    assert "forward" not in vars(module)
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name].numpy())
