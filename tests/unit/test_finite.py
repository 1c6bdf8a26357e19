"""No infinities anywhere: every number of a recipe, a policy, the settings and what is sent is finite, and bounded
where it is a time or is counted with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from weighbridge import limits
from weighbridge.registry import recipe, schemas
from weighbridge.registry.errors import InvalidRecipe
from weighbridge.registry.recipe import RolloutSettings
from weighbridge.settings import ConfigError, Settings, load
from weighbridge.storage.strict_json import InvalidJson, parse_object

OWN_RULE = {schemas.Benchmark, schemas.BenchmarkRow}
"""What registry.benchmarks checks by its own rule, which names what was measured."""


def kinds() -> list[type[BaseModel]]:
    """Every model that something from outside is parsed into."""
    of_recipes = [one for one in vars(recipe).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    sent = [one for one in vars(schemas).values() if isinstance(one, type) and issubclass(one, schemas.Sent)]
    groups = [
        kind
        for info in Settings.model_fields.values()
        for kind in [info.annotation]
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]
    return [kind for kind in (*of_recipes, *sent, *groups) if kind is not BaseModel and kind not in OWN_RULE]


def is_number(annotation: Any) -> bool:
    """A float, perhaps with bounds, perhaps none; not a table of them."""
    plain = get_origin(annotation) in (None, Annotated, Union, UnionType)
    return annotation is float or (plain and any(map(is_number, get_args(annotation))))


def floats() -> Iterator[tuple[type[BaseModel], str]]:
    for kind in kinds():
        for name, info in kind.model_fields.items():
            if is_number(info.annotation):
                yield kind, name


FLOATS = list(floats())


def refused(kind: type[BaseModel], name: str, value: object) -> bool:
    with pytest.raises(ValidationError) as wrong:
        kind.model_validate({name: value})
    return any(error["loc"][:1] == (name,) for error in wrong.value.errors())


def test_the_table_is_whole() -> None:
    """There are many, and the ones that did harm are among them."""
    assert len(FLOATS) > 50
    named = {(kind.__name__, name) for kind, name in FLOATS}
    assert {("RolloutSettings", "bake"), ("Gate", "min"), ("TokenWish", "ttl"), ("Policy", "min_bake")} <= named


@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=[f"{kind.__name__}.{name}" for kind, name in FLOATS])
def test_every_number_is_finite(kind: type[BaseModel], name: str) -> None:
    """Infinities of both signs and NaN, as numbers and as the words that Pydantic would read."""
    for value in (math.inf, -math.inf, math.nan, "inf", "-Infinity", "nan"):
        assert refused(kind, name, value), value


TIMES = ("bake", "lost_after", "load_timeout")


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("value", [1e308, 1e300, -1.0, 10 * 366 * 86400.0 + 1])
def test_times_of_a_rollout_are_bounded(name: str, value: float) -> None:
    """Added to the clock they stay a time."""
    assert refused(RolloutSettings, name, value)


HOSTILE = [
    "rollout: {bake: .inf}",
    "rollout: {lost_after: .inf}",
    "rollout: {load_timeout: .Inf}",
    "rollout: {load_timeout: -.inf}",
    "rollout: {bake: .nan}",
    "rollout: {lost_after: 1e308}",
    "rollout: {load_timeout: 1.0e+308}",
    "rollout: {max_error_rate: .nan}",
    "rollout: {min_requests: " + "9" * 5000 + "}",
    "rollout: {min_requests: 0x" + "f" * 5000 + "}",
    "rollout: {bake: 1" + "0" * 400 + ".0}",
    "rollout: {waves: [" + "9" * 400 + "]}",
    "rollout: {waves: ['" + "9" * 5000 + "%']}",
    "rollout: {waves: ['٥%']}",
    "rollout: {fleet: {a: " + "b" * 5000 + "}}",
    "rollout: {fleet: {" + ", ".join(f"k{number}: {'v' * 250}" for number in range(8)) + "}}",
    'rollout: {fleet: {a: "\\0"}}',
    'rollout: {fleet: {a: "\\ud800"}}',
    "gates: [{metric: accuracy, min: .nan}]",
    "gates: [{metric: mse, max: .inf}]",
    "gates: [{metric: mse, max: 1.0e+308}]",
    "threshold: .inf",
    "variants: [{method: bf16, max_ratio: .inf}]",
    "variants: [{method: prune-wanda, recover: {learning_rate: .nan}}]",
    "quality: {max_kl_mean: .inf}",
    "objective: {max_p99: .inf}",
    "objective: {max_memory: " + "9" * 30 + "}",
    "task: 2024-99-99",
    "task: 2024-02-31 25:61:61",
    "output: " + "x" * 300,
    "x" * 5000 + ": 1",
]


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:40] for text in HOSTILE])
def test_a_recipe_holds_no_number_that_cannot_be_kept(text: str) -> None:
    """Refused whole, at its line, in a message that is no longer than it must be."""
    with pytest.raises(InvalidRecipe) as wrong:
        recipe.parse(text)
    assert str(wrong.value).startswith("recipe.yaml")
    assert len(str(wrong.value)) < 1000


def test_what_a_recipe_allows_survives_its_column() -> None:
    """What is stored of any recipe that is taken can be read again."""
    text = "rollout: {bake: 604800, lost_after: 604800, waves: [1, 2147483647, '100%'], min_requests: 2147483647}"
    settings = recipe.parse(text).rollout
    assert RolloutSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    "name", ["daemon.list_seconds", "worker.lease_seconds", "host.request_seconds", "registry.body_seconds"]
)
@pytest.mark.parametrize("value", ["inf", "nan", "1e400", "-inf"])
def test_settings_are_finite(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By flag and by environment; the message names the setting."""
    with pytest.raises(ConfigError, match=name):
        load({name: value})
    monkeypatch.setenv("WEIGHBRIDGE_" + name.upper().replace(".", "__"), value)
    with pytest.raises(ConfigError, match=name):
        load()


@pytest.mark.parametrize("text", [b'{"a": 1e400}', b'{"a": -1e999}', b'{"a": NaN}', b'{"a": Infinity}'])
def test_json_of_strangers_holds_no_infinity(text: bytes) -> None:
    """Nor a number that becomes one."""
    with pytest.raises(InvalidJson):
        parse_object(text)
    assert parse_object(b'{"a": 1e308}') == {"a": 1e308}


def test_the_last_day_can_be_said() -> None:
    """In ISO 8601, by every client."""
    assert limits.LATEST == 253402214400.0
