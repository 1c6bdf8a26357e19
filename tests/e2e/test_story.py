"""The path, as a story: a checkpoint dropped into storage is weighed, and then it rolls. Read this file first.

Everything here is what production runs, but in one process: a store in memory, SQLite, tasks that run at once, two
hosts in memory (tests/fixtures/house.py). `house.settle()` lets everything happen that follows from what was done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fixtures.digits import Digits
from fixtures.house import House
from safetensors.numpy import save

from weighbridge.registry.errors import Conflict, NotFound

RECIPE = """
gates:
  - {metric: accuracy, min: 0.8}
  - {metric: accuracy, max_drop: 0.02}
rollout: {automatic: true, waves: [1, "100%"], bake: 0}
"""


@pytest.fixture
def shop(house: House, digits: Digits, digits_linear: Any) -> House:
    """A model with its wishes, its evaluation set, and the program that an operator registered for it."""
    house.register("digits-linear", digits_linear)
    house.put("recipe.yaml", RECIPE)
    house.put("eval.safetensors", save({"pixels": digits.held_out, "labels": digits.held_out_labels}))
    return house


def test_a_good_checkpoint_is_weighed_and_then_it_rolls(shop: House, digits: Digits) -> None:
    """Published weights become version 1, pass their gates, and are what both hosts answer with."""
    shop.publish("monday", digits.train(rows=500))
    shop.settle()

    first = shop.version("champion")
    assert (first.number, first.status) == (1, "ready")
    assert {name for name, proven in first.evidence.items() if proven} == {"bytes", "tensors", "program", "evaluated"}
    assert digits.accuracy(first) > 0.8
    assert shop.serving() == {1}
    for version, logits in shop.predict(digits.held_out):
        assert version == 1
        assert (logits.argmax(axis=1) == digits.held_out_labels).mean() == pytest.approx(digits.accuracy(first))


def test_a_better_one_takes_its_place_wave_by_wave(shop: House, digits: Digits) -> None:
    """The second version goes to one host first, then to all; the first is kept as `previous`."""
    shop.publish("monday", digits.train(rows=500))
    shop.settle()
    shop.publish("tuesday", digits.train(rows=1397))
    shop.settle()

    assert shop.serving() == {2}
    assert (shop.version("champion").number, shop.version("previous").number) == (2, 1)
    (rollout, *_) = shop.client.rollouts("digits")
    steps = shop.client.rollout(rollout.id).steps
    assert [step.action for step in steps] == ["assign", "assign", "finish"]
    assert [len(step.detail["hosts"]) for step in steps[:2]] == [1, 1]


def test_a_person_takes_it_back(shop: House, digits: Digits) -> None:
    """What was served before is rolled out again; where there was nothing before, it says so."""
    shop.publish("monday", digits.train(rows=500))
    shop.settle()
    with pytest.raises(NotFound, match="digits@previous"):
        shop.client.roll_back("digits")
    shop.publish("tuesday", digits.train(rows=1397))
    shop.settle()
    shop.client.roll_back("digits", reason="wrong on sevens")
    with pytest.raises(Conflict, match="abort it or wait"):
        shop.client.roll_back("digits")
    shop.settle()

    assert shop.serving() == {1}
    assert (shop.version("champion").number, shop.version("previous").number) == (1, 2)


def test_a_worse_one_is_rejected_with_the_numbers(shop: House, digits: Digits) -> None:
    """Weights that know less than the champion never reach a host."""
    shop.publish("monday", digits.train(rows=1397))
    shop.settle()
    shop.publish("tuesday", digits.noise())
    shop.settle()

    worse = shop.version(2)
    assert worse.status == "rejected"
    assert "accuracy" in worse.reason
    assert "0.80 (min)" in worse.reason
    assert shop.serving() == {1}


def test_what_is_broken_is_told_from_what_is_hostile(shop: House, digits: Digits) -> None:
    """A NaN is a bad checkpoint; a pickle dressed as safetensors is an attack. Neither is run, both are explained."""
    weights = digits.train(rows=500)
    weights["linear.bias"][3] = np.nan
    shop.drop("diverged.safetensors", weights)
    shop.put(
        "gift.safetensors", b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93."
    )
    shop.settle()

    seen = {version.path: shop.version(version.number) for version in shop.client.versions("digits")}
    diverged, gift = seen["digits/diverged.safetensors"], seen["digits/gift.safetensors"]
    assert (diverged.status, gift.status) == ("rejected", "quarantined")
    assert "linear.bias" in diverged.reason
    assert "gift.safetensors" in gift.reason
    assert shop.serving() == set()


def test_half_a_checkpoint_waits_and_says_for_what(shop: House, digits: Digits) -> None:
    """An upload that was cut off is no version; when the rest arrives it becomes one."""
    whole = save(digits.train(rows=500))
    shop.put("slow.safetensors", whole[: len(whole) // 2])
    shop.settle()
    (waiting,) = shop.client.checkpoints(state="waiting")
    assert f"{len(whole) // 2:,} of {len(whole):,} bytes" in waiting.reason
    assert list(shop.client.versions("digits")) == []

    shop.put("slow.safetensors", whole)
    shop.settle()
    assert shop.version().status == "ready"
    assert list(shop.client.checkpoints(state="waiting")) == []


def test_the_same_bytes_seen_twice_are_one_version(shop: House, digits: Digits) -> None:
    """Listing the bucket again, or hearing of an object twice, changes nothing."""
    shop.publish("monday", digits.train(rows=500))
    shop.settle()
    events = shop.client.status().last_seq
    shop.settle()
    shop.settle()
    assert [version.number for version in shop.client.versions("digits")] == [1]
    assert shop.client.status().last_seq == events


def test_a_host_that_cannot_load_it_sends_the_fleet_back(shop: House, digits: Digits) -> None:
    """The first wave fails: the rollout is rolled back, the reason names the host, and the champion stays."""
    shop.publish("monday", digits.train(rows=500))
    shop.settle()
    for host in shop.hosts:
        host.broken.add(2)
    shop.publish("tuesday", digits.train(rows=1397))
    shop.settle()

    assert shop.version(2).status == "ready"
    assert shop.version("champion").number == 1
    assert shop.serving() == {1}
    (rollout, *_) = shop.client.rollouts("digits")
    assert rollout.status == "rolled_back"
    assert any(host.id in rollout.reason for host in shop.hosts)


def test_every_change_is_in_the_feed_in_order(shop: House, digits: Digits) -> None:
    """Who wants to know what happened reads the events: gapless, resumable, with the cause."""
    shop.publish("monday", digits.train(rows=500))
    shop.settle()

    feed = shop.client.events()
    assert [event.seq for event in feed] == list(range(1, len(feed) + 1))
    kinds = [event.kind for event in feed]
    path = ["version.recorded", "version.ready", "rollout.started", "rollout.wave_assigned", "rollout.finished"]
    assert [kind for kind in kinds if kind in path] == [*path[:4], path[3], path[4]]
    resumed = shop.client.events(after=feed[2].seq)
    assert [event.seq for event in resumed] == [event.seq for event in feed[3:]]
