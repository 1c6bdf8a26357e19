"""What judges a model is watched: what lacked it is judged again by itself, the real parts on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fixtures.digits import Digits
from fixtures.house import MODEL, House
from safetensors.numpy import save

AUTOMATIC = "rollout: {automatic: true, waves: ['100%'], bake: 0}\n"
STRICT = "gates: [{metric: accuracy, min: 0.999}]\n"
GATED = "gates: [{metric: accuracy, min: 0.8}]\n"


@pytest.fixture
def shop(database_url: str, tmp_path: Path, digits_linear: Any) -> Iterator[House]:
    """A model whose program is registered; no recipe, no evaluation set."""
    with ExitStack() as parts:
        house = House(tmp_path, parts, database=database_url)
        house.register("digits-linear", digits_linear)
        yield house


def evaluation(digits: Digits, *, wrong: bool = False) -> bytes:
    labels = digits.held_out_labels
    return save({"pixels": digits.held_out, "labels": (labels + 1) % 10 if wrong else labels})


def jobs(house: House, number: int) -> list[tuple[str, str]]:
    return [(job.stage, job.key.rpartition(":")[2]) for job in house.version(number).jobs]


def test_rejudge_uses_what_lies_there_now(shop: House, digits: Digits) -> None:
    """Both files changed and no other checkpoint came: the verdict is by the present ones, pinned anew."""
    shop.put("recipe.yaml", STRICT)
    shop.put("eval.safetensors", evaluation(digits))
    shop.publish("monday", digits.train(rows=500))
    shop.settle()
    assert shop.version().status == "rejected"
    shop.put("recipe.yaml", GATED)
    shop.put("train.safetensors", evaluation(digits))
    shop.settle()
    assert shop.version().status == "rejected"  # a verdict that was reached stays until somebody asks
    shop.client.rejudge(MODEL, 1, "the gate was too strict")
    shop.settle()
    found = shop.version()
    assert (found.status, (found.recipe or {})["gates"][0]["min"]) == ("ready", 0.8)
    assert found.facts["training"]["pin"]["key"] == "digits/train.safetensors"


def test_what_waits_for_a_program_is_judged_again_when_the_recipe_names_one(
    shop: House, digits: Digits, digits_linear: Any
) -> None:
    """Once: another listing, and another start of the daemon, change nothing more."""
    shop.register("digits-twin", digits_linear)
    shop.publish("monday", digits.train(rows=500))
    shop.settle()
    assert shop.version().status == "needs_binding"
    shop.put("recipe.yaml", "program: {template: digits-twin}\n")
    shop.settle()
    assert shop.version().status == "ready"
    seen = jobs(shop, 1)
    assert seen == [("validate", "1"), ("validate", "2"), ("evaluate", "2")]
    shop.daemon.judging.changed(MODEL)
    shop.settle()
    assert jobs(shop, 1) == seen


def test_a_set_that_appears_judges_what_was_judged_without_one(shop: House, digits: Digits) -> None:
    """What was rejected for want of it is ready then; what is ready is measured where it stands, and serves on."""
    shop.put("recipe.yaml", AUTOMATIC)
    shop.publish("monday", digits.train(rows=500))
    shop.settle()
    assert shop.serving() == {1}
    shop.put("recipe.yaml", GATED)
    shop.publish("tuesday", digits.train(rows=900))
    shop.settle()
    assert "there is no eval.safetensors" in shop.version(2).reason
    events = shop.client.status().last_seq
    shop.put("eval.safetensors", evaluation(digits))
    shop.settle()
    assert (shop.version(1).status, shop.version(2).status) == ("ready", "ready")
    assert digits.accuracy(shop.version(1)) > 0.8
    assert jobs(shop, 1) == [("validate", "1"), ("evaluate", "1")]
    told = [(event.kind, event.version) for event in shop.client.events(events) if event.version == 1]
    assert told == [("version.evaluated_again", 1)]  # never away from its hosts
    assert shop.serving() == {1}


def test_what_serves_is_moved_by_a_verdict_alone(shop: House, digits: Digits) -> None:
    """A set tells that it is bad, and no gate of its task asks: it serves on, with the numbers for everybody to see."""
    shop.put("recipe.yaml", AUTOMATIC)
    shop.publish("monday", digits.train(rows=900))
    shop.settle()
    shop.put("recipe.yaml", AUTOMATIC + "gates: [{metric: mse, max: 0.1}]\n")  # of another task: judges nothing
    shop.publish("tuesday", digits.noise())
    shop.settle()
    assert shop.serving() == {2}
    shop.put("eval.safetensors", evaluation(digits, wrong=True))
    shop.settle()
    assert shop.serving() == {2}
    assert digits.accuracy(shop.version(2)) < 0.3
    assert shop.version(1).evidence["evaluated"] is True


def test_a_recipe_that_is_wrong_is_waited_for(shop: House, digits: Digits) -> None:
    """The version that is judged anew says so; it goes on by itself when the recipe is mended."""
    shop.put("recipe.yaml", STRICT)
    shop.publish("monday", digits.train(rows=500))
    shop.settle()
    shop.put("recipe.yaml", "gates: [{metric: acuracy, min: 0.8}]\n")
    shop.client.rejudge(MODEL, 1)
    shop.publish("tuesday", digits.train(rows=900))
    shop.settle()
    assert shop.version(1).status == "discovered"
    assert "recipe.yaml line 1: gates.0.metric" in shop.version(1).reason
    assert [c.reason for c in shop.client.status().waiting if "gates.0.metric" in c.reason]
    shop.put("recipe.yaml", "gates: []\n")
    shop.settle()
    assert [shop.version(number).status for number in (1, 2)] == ["ready", "ready"]
