"""kill -9 of any role while a fleet moves: the rollout ends as it would have, with one champion."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from fixtures.digits import Digits
from fixtures.running import START_SECONDS, StartUp, Up
from fixtures.worker import until

from weighbridge.registry.errors import RegistryError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = """
gates:
  - {metric: accuracy, min: 0.8}
rollout: {automatic: true, waves: [1, "100%"], bake: 1}
"""


def has_aliases(up: Up, wanted: dict[str, int]) -> bool:
    try:
        return {alias.name: alias.number for alias in up.client.aliases("digits")} == wanted
    except RegistryError:
        return False


def test_whatever_is_killed_in_mid_rollout_the_fleet_arrives(
    start_up: StartUp, digits: Digits, digits_linear: Any
) -> None:
    """Daemon, worker, broker, registry and a host, one for each rollout, in its first wave: each version once, each
    rollout once, finished; both hosts answer from the last one."""
    up = start_up({"host.report_seconds": 1})
    up.register(digits_linear)
    up.wish(digits, RECIPE)
    roles = ("daemon", "worker", "valkey", "registry", "host-1")
    for number, role in enumerate(roles, 1):
        seen = up.client.status().last_seq
        up.publish(f"run-{number}", digits.train(rows=500 + 100 * number))
        until("the first wave", partial(up.client.events, seen, kinds=["rollout.wave_assigned"]), START_SECONDS)
        up.kill(role)
        wanted = {"champion": number} | ({"previous": number - 1} if number > 1 else {})
        until(f"champion {number} in spite of {role}", partial(has_aliases, up, wanted), START_SECONDS)

    assert up.statuses() == {f"digits/run-{number}/": "ready" for number in range(1, 6)}
    until("both hosts answer from the last", lambda: up.serving() == ["5", "5"], START_SECONDS)
    assert [(rollout.number, rollout.status) for rollout in up.client.rollouts("digits")] == [
        (number, "finished") for number in range(5, 0, -1)
    ]
    events = up.client.events(limit=1000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert len([event for event in events if event.kind == "rollout.finished"]) == 5
