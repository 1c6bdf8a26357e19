"""The recipe lies in the untrusted bucket: what the operator's policy says, it cannot weaken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fixtures.digits import Digits
from fixtures.house import House
from safetensors.numpy import save

from weighbridge.registry.errors import Invalid
from weighbridge.registry.recipe import Gate, Policy

POLICY = Policy(model="digits", gates=(Gate(metric="accuracy", min=0.8),), automatic=False, fast_lane=False, min_bake=5)
GREEDY = """
lane: fast
gates: [{metric: accuracy, min: 0.01}]
rollout: {automatic: true, bake: 0}
"""


@pytest.fixture
def shop(tmp_path: Path, digits: Digits, digits_linear: Any) -> Iterator[House]:
    """A house whose operator has a policy, and a recipe that wants to get round it."""
    with ExitStack() as parts:
        house = House(tmp_path, parts, policies=(POLICY,))
        house.register("digits-linear", digits_linear)
        house.put("recipe.yaml", GREEDY)
        house.put("eval.safetensors", save({"pixels": digits.held_out, "labels": digits.held_out_labels}))
        yield house


def test_a_recipe_cannot_weaken_the_policy(shop: House, digits: Digits) -> None:
    """A version that only the recipe's gate would pass is rejected; a good one waits for a person and then bakes as
    long as the operator says. Each wish that was in vain is told, with the version and as one event."""
    shop.publish("bad", digits.noise())
    shop.publish("good", digits.train(rows=1397))
    shop.settle()

    found = {version.path: shop.version(version.number) for version in shop.client.versions("digits")}
    bad, good = found["digits/bad/"], found["digits/good/"]
    assert (bad.status, good.status) == ("rejected", "ready")
    assert "0.80 (min)" in bad.reason
    assert list(shop.client.rollouts("digits")) == []
    assert shop.serving() == set()

    wishes = ("lane: fast", "gates.accuracy.min: 0.01", "rollout.automatic", "rollout.bake")
    for version in (bad, good):
        assert all(any(wish in told for told in version.recipe_ignored) for wish in wishes), version.recipe_ignored
    (event,) = shop.client.events(kinds=["recipe.overruled"])
    assert event.model == "digits"
    assert all(wish in event.reason for wish in wishes)

    with pytest.raises(Invalid, match="min_bake = 5 s"):
        shop.client.start_rollout("digits", good.number, settings={"bake": 0})
    shop.client.start_rollout("digits", good.number)
    shop.settle()
    (rollout,) = shop.client.rollouts("digits")
    assert rollout.status == "running", "the first host has it, and bakes for as long as the operator says"
