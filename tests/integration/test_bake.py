"""Bakes from end to end: real agents with engine children, real requests, the registry's own steps.

Clients who send what no version takes roll nothing back; a version that fails where the old one answers is rolled back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.api import Api, sqlite_only
from fixtures.hosting import MODEL, InThread, put_version, until
from fixtures.rolling import Fleet
from sqlmodel import select

from weighbridge.registry import rollouts
from weighbridge.registry.models import Assignment, Rollout, Version

pytestmark = [sqlite_only, pytest.mark.slow]
BAD, SEVEN = -500.0, 7.0
"""What no version answers; what only some do not."""
Hosts = Callable[[int], list[InThread]]


@pytest.fixture
def hosts(api: Api, tmp_path: Path) -> Iterator[Hosts]:
    """Starts so many agents."""
    running: list[InThread] = []

    def start(count: int) -> list[InThread]:
        running.extend(InThread(api, tmp_path / f"host-{number}") for number in range(count))
        for host in running:
            until(host, lambda host=host: host.id)
        return running

    yield start
    for host in running:
        host.stop()


class Bake:
    """A fleet that serves version 1, and the rollout of another to its first host, baking for an hour."""

    def __init__(self, api: Api, fleet: list[InThread], program: str = "times") -> None:
        self.api, self.hosts, self.steps = api, fleet, Fleet(api.db)
        self.start(put_version(api, 1), bake=0)
        self.until_it_is("finished")
        self.ask([1.0] * 9 + [BAD], times=3)
        self.new = put_version(api, 2, program)
        self.start(self.new, bake=3600)
        self.step()
        until(fleet[0], lambda: any(self.version(host) == self.new.number for host in fleet))

    def start(self, version: Version, **settings: Any) -> None:
        wishes = {"min_requests": 20, "max_error_rate": 0.01, "waves": [1, "100%"], **settings}
        with self.api.db.transaction() as tx:
            rollouts.start(tx, MODEL, version.number, settings=wishes, actor="test")

    def version(self, host: InThread) -> int:
        """What answers there; 0 when nothing does."""
        try:
            return host.infer(1.0)[0]
        except LookupError:
            return 0

    def ask(self, xs: list[float], times: int = 1) -> None:
        """The same clients for every host."""
        for x in xs * times:
            for host in self.hosts:
                try:
                    host.infer(x)
                except LookupError:
                    continue

    def step(self) -> Rollout:
        self.steps.wake()
        rollout = self.steps.step()
        self.api.notifier.ring("hosts")
        return rollout

    def counted(self) -> dict[str, Assignment]:
        with self.api.db.read() as tx:
            return {row.host_id: row for row in tx.scalars(select(Assignment)).all()}

    def until_counted(self, requests: int) -> None:
        """Until every host has reported so many requests that say something."""
        until(self.hosts[0], lambda: all(row.requests >= requests for row in self.counted().values()))

    def until_it_is(self, status: str) -> Rollout:
        return until(self.hosts[0], lambda: (found := self.step()).status == status and found)  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 2])
def test_bad_clients_roll_nothing_back(api: Api, hosts: Hosts, count: int) -> None:
    """One request in ten is one that no version answers: the bake goes on, on a fleet and on a single host."""
    bake = Bake(api, hosts(count))
    bake.ask([1.0] * 9 + [BAD], times=10)
    bake.until_counted(60)
    rollout = bake.step()
    assert (rollout.status, rollout.reason) == ("running", "")
    (new,) = [row for row in bake.counted().values() if row.slots[0]["version"] == bake.new.number]
    assert new.errors == 0


@pytest.mark.parametrize("program", ["picky", "narrow"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_version_that_does_not_answer_what_the_old_one_does_is_rolled_back(
    api: Api, hosts: Hosts, program: str, count: int
) -> None:
    """It fails inside, or its contract refuses: a smaller vocabulary. Also where no other host could be compared."""
    bake = Bake(api, hosts(count), program)
    bake.ask([1.0] * 9 + [SEVEN], times=10)
    bake.until_counted(60)
    rollout = bake.until_it_is("rolling_back")
    assert "requests failed" in rollout.reason
    until(bake.hosts[0], lambda: all(bake.version(host) == 1 for host in bake.hosts))


def test_a_version_that_fails_by_itself_is_rolled_back(api: Api, hosts: Hosts) -> None:
    """After some answers it fails on everything, its golden too: no comparison is needed."""
    bake = Bake(api, hosts(1), "tiring")
    bake.ask([1.0], times=60)
    rollout = bake.until_it_is("rolling_back")
    assert "requests failed" in rollout.reason
    until(bake.hosts[0], lambda: bake.version(bake.hosts[0]) == 1)
