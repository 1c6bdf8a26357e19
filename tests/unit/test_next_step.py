"""The rollout's next step: a table of situations, and random histories of a simulated fleet."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weighbridge.registry.lifecycle import RolloutStatus
from weighbridge.registry.recipe import RolloutSettings
from weighbridge.workers.judge import Counts
from weighbridge.workers.next_step import (
    Assign,
    Finish,
    Hold,
    HostSeen,
    Observations,
    RollBack,
    RolloutView,
    SlotSeen,
    Wait,
    lost,
    next_step,
    wave_size,
)

NEW, OLD = "new-artifact", "old-artifact"
NOW = 1_000_000.0
SETTINGS = RolloutSettings(waves=(1, "50%", "100%"), bake=10, lost_after=60, load_timeout=100, min_requests=20)
VIEW = RolloutView(number=2, status=RolloutStatus.RUNNING, settings=SETTINGS)


def idle(name: str, silent: float = 0.0) -> HostSeen:
    """A host on the old version."""
    slots = (SlotSeen(OLD, "live", "passed"),)
    return HostSeen(name, silent, True, 1, (OLD,), NOW - 1000, NOW - 999, 1, slots, wanted=NEW, back=OLD)


def loading(name: str, since: float = 1.0) -> HostSeen:
    """A host that was given the new version and has not reported it."""
    return replace(idle(name), generation=2, artifacts=(NEW,), assigned_at=NOW - since, live_at=None)


def live(name: str, since: float = 11.0, requests: int = 0, errors: int = 0) -> HostSeen:
    """A host on the new version since `since` seconds."""
    slots = (SlotSeen(NEW, "live", "passed"), SlotSeen(OLD, "standby", "passed"))
    return replace(
        loading(name, since + 1),
        live_at=NOW - since,
        observed_generation=2,
        slots=slots,
        counts=Counts(requests, errors),
    )


def reporting(name: str, state: str, golden: str = "unchecked", reason: str = "", since: float = 1.0) -> HostSeen:
    """A host that reports the new version in `state`."""
    return replace(loading(name, since), observed_generation=2, slots=(SlotSeen(NEW, state, golden, reason),))


def seen(*hosts: HostSeen, withdrawn: str = "") -> Observations:
    return Observations(NOW, hosts, withdrawn)


def after(wave: int, *names: str, **changes: object) -> RolloutView:
    return replace(VIEW, wave=wave, given=names, **changes)  # type: ignore[arg-type]


FLEET = (idle("a"), idle("b"), idle("c"), idle("d"))


@pytest.mark.parametrize(
    ("rollout", "hosts", "expected"),
    [
        pytest.param(VIEW, FLEET, Assign(1, ("a",)), id="the first wave, hosts in a stable order"),
        pytest.param(VIEW, tuple(reversed(FLEET)), Assign(1, ("a",)), id="whatever order they are seen in"),
        pytest.param(VIEW, (idle("a", 61), *FLEET[1:]), Hold, id="a silent host holds when none may be lost"),
        pytest.param(after(1, "a"), (loading("a"), *FLEET[1:]), Wait(NOW + 60.0), id="loading"),
        pytest.param(after(1, "a"), (live("a", 4), *FLEET[1:]), Wait(NOW + 6.0), id="baking"),
        pytest.param(after(1, "a"), (live("a"), *FLEET[1:]), Assign(2, ("b",)), id="half of the fleet, cumulative"),
        pytest.param(after(1, "a", promoted=1), (live("a", 1), *FLEET[1:]), Assign(2, ("b",)), id="promoted"),
        pytest.param(
            after(2, "a", "b", promoted=1), (live("a"), live("b", 1), *FLEET[2:]), Wait(NOW + 9), id="one wave only"
        ),
        pytest.param(
            after(2, "a", "b"), (live("a"), live("b"), *FLEET[2:]), Assign(3, ("c", "d")), id="the whole fleet"
        ),
        pytest.param(after(3, "a", "b"), (live("a"), live("b")), Finish(RolloutStatus.FINISHED), id="finished"),
        pytest.param(after(3, "a"), (live("a"), idle("e")), Assign(3, ("e",)), id="a host that joins the last wave"),
        pytest.param(VIEW, (idle("a"),), Assign(3, ("a",)), id="a fleet of one has only the last wave"),
        pytest.param(VIEW, (), Hold, id="nobody there"),
        pytest.param(after(1, "a"), (reporting("a", "failed", reason="OOM"), *FLEET[1:]), RollBack, id="failed load"),
        pytest.param(after(1, "a"), (reporting("a", "live", "failed"), *FLEET[1:]), RollBack, id="golden failed"),
        pytest.param(after(1, "a"), (reporting("a", "live"), *FLEET[1:]), Wait, id="live, golden not checked yet"),
        pytest.param(after(1, "a"), (reporting("a", "loading", since=100), *FLEET[1:]), RollBack, id="load timeout"),
        pytest.param(after(1, "a"), (live("a", 5, 100, 2), *FLEET[1:]), RollBack, id="over the error limit"),
        pytest.param(after(1, "a"), (live("a", 5, 100, 1), *FLEET[1:]), Wait, id="at the error limit"),
        pytest.param(after(1, "a"), (live("a", 5, 19, 19), *FLEET[1:]), Wait, id="too few requests to decide"),
        pytest.param(
            after(2, "a", "b"), (live("a", 50, 100, 9), live("b")), RollBack, id="hosts of earlier waves count too"
        ),
        pytest.param(
            after(1, "a"),
            (replace(live("a"), slots=(SlotSeen(NEW, "loading"),)), *FLEET[1:]),
            Hold,
            id="a restarted host holds, it does not condemn",
        ),
        pytest.param(
            after(1, "a", status=RolloutStatus.PAUSED), (reporting("a", "failed"), idle("b")), Wait, id="paused"
        ),
        pytest.param(replace(VIEW, status=RolloutStatus.PENDING), FLEET, Wait, id="pending"),
        pytest.param(replace(VIEW, abort="x"), FLEET, Finish(RolloutStatus.ABORTED, "x"), id="abort before the start"),
        pytest.param(after(1, "a", abort="x"), (live("a"),), RollBack("x", ("a",)), id="abort"),
        pytest.param(
            after(1, "a", abort="x", status=RolloutStatus.PAUSED),
            (live("a"),),
            RollBack("x", ("a",)),
            id="abort paused",
        ),
    ],
)
def test_next_step(rollout: RolloutView, hosts: tuple[HostSeen, ...], expected: object) -> None:
    """Each situation has one answer."""
    step = next_step(rollout, seen(*hosts))
    if isinstance(expected, type):
        assert isinstance(step, expected)
    elif isinstance(expected, Wait):
        assert isinstance(step, Wait)
        assert step.until == expected.until
    else:
        assert step == expected


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (reporting("a", "failed", reason="CUDA out of memory"), "host a: version 2 did not load: CUDA out of memory"),
        (reporting("a", "loading", since=200), "host a: not live after 100 s (load_timeout)"),
        (live("a", 5, 200, 11), "host a: 11 of 200 requests failed (5.50%; at most 1.00%)"),
        (reporting("a", "live", "failed", "output logits off by 0.3"), "host a: the reference golden failed: output"),
    ],
)
def test_a_roll_back_names_the_host_and_the_numbers(host: HostSeen, words: str) -> None:
    """The reason of a roll back says where, what and how much, and everything that was assigned goes back."""
    step = next_step(after(2, "a", "b"), seen(host, live("b")))
    assert isinstance(step, RollBack)
    assert step.reason.startswith(words)
    assert step.hosts == ("a", "b")


def test_a_hold_says_what_is_missing() -> None:
    """Labels without hosts, silent hosts and hosts that fell back are named."""
    labelled = replace(VIEW, settings=SETTINGS.model_copy(update={"fleet": {"zone": "b", "gpu": "h200"}}))
    assert next_step(labelled, seen()) == Hold("no host with labels gpu=h200, zone=b")
    silent = next_step(VIEW, seen(idle("a", 75), idle("b")))
    assert silent == Hold("silent for 60 s or more: host a (1 lost, at most 0); start or retire it")


def test_a_withdrawn_version_goes_back_even_from_a_pause() -> None:
    """A version that failed behind its rollout is taken from the hosts, also while a person paused the rollout."""
    for status in (RolloutStatus.RUNNING, RolloutStatus.HOLDING, RolloutStatus.PAUSED):
        step = next_step(after(1, "a", status=status), seen(live("a"), withdrawn="accuracy 0.7 < 0.9"))
        assert step == RollBack("accuracy 0.7 < 0.9", ("a",))


def test_lost_hosts_leave_the_wave_within_the_bound() -> None:
    """A lost canary proves nothing: another takes its place; the last wave waits for no lost host but assigns it."""
    tolerant = SETTINGS.model_copy(update={"max_lost": 1})
    gone = replace(live("a"), silent=61.0)
    rollout = after(1, "a", settings=tolerant)
    assert lost(rollout, seen(gone, *FLEET[1:])) == ("a",)
    assert next_step(rollout, seen(gone, *FLEET[1:])) == Assign(1, ("b",))
    rollout = after(2, "b", "c", settings=tolerant)
    assert next_step(rollout, seen(idle("a", 61), live("b"), live("c"))) == Assign(3, ("a",))
    rollout = after(3, "b", "c", "a", settings=tolerant)
    assert next_step(rollout, seen(replace(loading("a"), silent=61.0), live("b"), live("c"))) == Finish(
        RolloutStatus.FINISHED
    )


def test_rolling_back_waits_for_the_hosts_that_answer() -> None:
    """It ends when every touched host holds the old version, is silent, or cannot; then it says which could not."""
    rollout = after(2, "a", "b", status=RolloutStatus.ROLLING_BACK)
    back = replace(idle("a"), generation=3, observed_generation=3, assigned_at=NOW - 2)
    waits = replace(live("b"), generation=3, artifacts=(OLD,), assigned_at=NOW - 2, live_at=None)
    assert next_step(rollout, seen(back, waits)) == Wait(NOW + 60, "rolling back")
    assert next_step(rollout, seen(back, replace(waits, silent=60.0))) == Finish(RolloutStatus.ROLLED_BACK)
    assert next_step(rollout, seen(back)) == Finish(RolloutStatus.ROLLED_BACK)
    late = next_step(rollout, seen(back, replace(waits, assigned_at=NOW - 100)))
    assert late == Finish(RolloutStatus.ROLLED_BACK, "host b did not return within 100 s (load_timeout)")
    empty = replace(rollout, given=("a",))
    assert isinstance(next_step(empty, seen(replace(waits, id="a", back=None))), Wait)
    none = replace(waits, id="a", back=None, observed_generation=3, slots=())
    assert next_step(empty, seen(none)) == Finish(RolloutStatus.ROLLED_BACK)


def test_each_host_is_held_to_the_variant_of_its_kind() -> None:
    """What is live on one kind says nothing of another's; each returns to what it had."""
    int8 = replace(live("b"), wanted="int8-artifact", back="int8-old")
    assert isinstance(next_step(after(3, "a", "b"), seen(live("a"), int8)), Hold), "it was live, but with another one"
    right = replace(int8, slots=(SlotSeen("int8-artifact", "live", "passed"),))
    assert next_step(after(3, "a", "b"), seen(live("a"), right)) == Finish(RolloutStatus.FINISHED)
    rollout = after(3, "a", "b", status=RolloutStatus.ROLLING_BACK)
    old = replace(live("a"), slots=(SlotSeen(OLD, "live", "passed"),), assigned_at=NOW - 2)
    assert isinstance(next_step(rollout, seen(old, replace(right, assigned_at=NOW - 2))), Wait)
    back = replace(right, slots=(SlotSeen("int8-old", "live", "passed"),))
    assert next_step(rollout, seen(old, back)) == Finish(RolloutStatus.ROLLED_BACK)


def test_every_variant_has_its_canaries_early() -> None:
    """A wave takes the hosts of each variant in turn."""
    int8 = tuple(replace(idle(name), wanted="int8-artifact") for name in "yz")
    assert next_step(replace(VIEW, settings=SETTINGS.model_copy(update={"waves": ("50%",)})), seen(*FLEET, *int8)) == (
        Assign(1, ("a", "b", "c", "d", "y", "z"))
    ), "the last wave is everybody"
    halves = SETTINGS.model_copy(update={"waves": ("50%", "100%")})
    assert next_step(replace(VIEW, settings=halves), seen(*FLEET, *int8)) == Assign(1, ("a", "y", "b"))
    wave = replace(live("a"), wanted=NEW)
    assert next_step(after(1, "a"), seen(wave, *FLEET[1:], *int8)) == Assign(2, ("y", "b"))


def test_hosts_that_another_variant_leaves_alone_are_no_canaries() -> None:
    """Waves are counted and filled with the hosts that change; with none of them it is over."""
    same = tuple(replace(idle(name), wanted=OLD, holds=True) for name in "abc")
    changes = tuple(idle(name) for name in "xyz")
    assert next_step(VIEW, seen(*same, *changes)) == Assign(1, ("x",))
    assert next_step(after(1, "x"), seen(*same, live("x"), *changes[1:])) == Assign(2, ("y",)), "half of three"
    assert next_step(VIEW, seen(*same)) == Finish(RolloutStatus.FINISHED)
    assert isinstance(next_step(VIEW, seen(replace(same[0], silent=61.0))), Hold)


@pytest.mark.parametrize(
    ("wave", "fleet", "size"), [(1, 4, 1), (9, 4, 4), ("25%", 4, 1), ("1%", 4, 1), ("50%", 3, 2), ("100%", 7, 7)]
)
def test_wave_sizes(wave: int | str, fleet: int, size: int) -> None:
    """A count is bounded by the fleet; a share is rounded up."""
    assert wave_size(wave, fleet) == size


# --- random histories of a simulated fleet

behaviours = st.sampled_from(["good", "good", "good", "slow", "fails", "golden", "errors", "silent", "flaps"])
waves = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 100).map(lambda share: f"{share}%")), max_size=4)


class Fleet:
    """A fleet that obeys assignments, each host in its own manner."""

    def __init__(self, manners: list[str], options: RolloutSettings) -> None:
        self.manners = {f"h{index}": manner for index, manner in enumerate(manners)}
        self.hosts = {name: replace(idle(name), assigned_at=0.0, live_at=1.0) for name in self.manners}
        self.view = replace(VIEW, settings=options)
        self.now = NOW

    def observe(self) -> Observations:
        return Observations(self.now, tuple(self.hosts.values()))

    def assign(self, names: tuple[str, ...], artifact: str) -> None:
        for name in names:
            host = self.hosts[name]
            self.hosts[name] = replace(
                host, generation=host.generation + 1, artifacts=(artifact,), assigned_at=self.now, live_at=None
            )
            self.hosts[name] = replace(self.hosts[name], counts=Counts())

    def tick(self, name: str, seconds: float) -> None:
        """Time passes; the host reports in its manner."""
        self.now += seconds
        host, manner = self.hosts[name], self.manners[name]
        if manner == "silent" and NEW in host.artifacts:
            self.hosts[name] = replace(host, silent=host.silent + seconds)
            return
        artifact = host.artifacts[0]
        bad = artifact == NEW
        state, golden = ("live", "passed")
        if bad and manner == "slow" and self.now - host.assigned_at < 30:
            state, golden = "loading", "unchecked"
        if bad and manner == "fails":
            state, golden = "failed", "unchecked"
        if bad and manner == "golden":
            golden = "failed"
        if bad and manner == "flaps" and int(self.now) % 3 == 0:
            state, golden = "loading", "unchecked"
        first = (
            host.live_at if host.live_at is not None else self.now if (state, golden) == ("live", "passed") else None
        )
        self.hosts[name] = replace(
            host,
            silent=0.0,
            observed_generation=host.generation,
            slots=(SlotSeen(artifact, state, golden),),
            live_at=first,
            counts=host.counts + Counts(50, 25 if bad and manner == "errors" else 0),
        )

    def act(self) -> None:
        """Take the next step as workers.rollout does, checking what no step may do."""
        step = next_step(self.view, self.observe())
        status = RolloutStatus.RUNNING if self.view.status is RolloutStatus.HOLDING else self.view.status
        if isinstance(step, Assign):
            self._check_wave(step)
            self.assign(step.hosts, NEW)
            self.view = replace(self.view, wave=step.wave, given=(*self.view.given, *step.hosts), status=status)
        elif isinstance(step, RollBack):
            assert step.reason
            assert set(step.hosts) == set(self.view.given)
            self.assign(step.hosts, OLD)
            self.view = replace(self.view, status=RolloutStatus.ROLLING_BACK)
        elif isinstance(step, Hold):
            assert step.missing
            self.view = replace(self.view, status=RolloutStatus.HOLDING)
        elif isinstance(step, Finish):
            self.view = replace(self.view, status=step.status)
        else:
            self.view = replace(self.view, status=status)

    def _check_wave(self, step: Assign) -> None:
        settings_ = self.view.settings
        assert step.hosts
        assert not set(step.hosts) & set(self.view.given), "a host is given the version once"
        assert step.wave >= self.view.wave
        if step.wave < len(settings_.waves):
            silent = set(lost(self.view, self.observe()))
            size = wave_size(settings_.waves[step.wave - 1], len(self.hosts))
            assert len(set(self.view.given) - silent) + len(step.hosts) <= size

    @property
    def ended(self) -> bool:
        return self.view.status in (RolloutStatus.FINISHED, RolloutStatus.ROLLED_BACK, RolloutStatus.ABORTED)


@settings(max_examples=150, deadline=None)
@given(
    manners=st.lists(behaviours, max_size=7),
    waves=waves,
    bake=st.sampled_from([0, 5, 40]),
    max_lost=st.integers(0, 2),
    order=st.lists(st.tuples(st.integers(0, 6), st.floats(0.1, 30)), max_size=60),
    abort_at=st.none() | st.integers(0, 60),
)
def test_random_histories(
    manners: list[str],
    waves: list[int | str],
    bake: float,
    max_lost: int,
    order: list[tuple[int, float]],
    abort_at: int | None,
) -> None:
    """Whatever hosts do: no wave is exceeded, and it ends with one version everywhere, or holds with a reason."""
    options = RolloutSettings(waves=tuple(waves), bake=bake, max_lost=max_lost, lost_after=20, load_timeout=90)
    fleet = Fleet(manners, options)
    names = sorted(fleet.hosts)
    settle = [(index, 3.0) for _ in range(80) for index in range(len(names))] or [(0, 3.0)] * 80
    for moment, (index, seconds) in enumerate([*order, *settle]):
        if fleet.ended:
            break
        if moment == abort_at:
            fleet.view = replace(fleet.view, abort="aborted by a person")
        if names:
            fleet.tick(names[index % len(names)], seconds)
        fleet.act()
    if not fleet.ended:
        assert fleet.view.status in (RolloutStatus.HOLDING, RolloutStatus.RUNNING)
        if fleet.view.status is RolloutStatus.RUNNING:
            assert "flaps" in manners, "only a host that never settles keeps a rollout going"
        return
    wanted = {artifact for host in fleet.hosts.values() for artifact in host.artifacts} or {OLD}
    assert wanted == ({NEW} if fleet.view.status is RolloutStatus.FINISHED else {OLD})
