"""The judge: absolute for what is the version's own, a comparison with the old version for what may lie in requests."""

from __future__ import annotations

import random
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weighbridge.registry.recipe import RolloutSettings
from weighbridge.workers.judge import NOTHING, Counts, Harm, Healthy, Inconclusive, Old, Sample, judge, tail

SETTINGS = RolloutSettings(max_error_rate=0.01, min_requests=20)


def asked(requests: int, failed: int = 0, kind: str = "input_errors") -> Counts:
    return Counts(requests, **{kind: failed})


def verdict(new: Counts, old: Old = Old()) -> object:  # noqa: B008  it is frozen
    return judge([Sample("a", new)], old, SETTINGS)


@pytest.mark.parametrize(
    ("new", "old", "found"),
    [
        # The version's own errors need no comparison.
        (asked(100, 2, "errors"), Old(), Harm),
        (asked(100, 1, "errors"), Old(), Healthy),
        (asked(19, 19, "errors"), Old(), Healthy),
        # 10% bad clients: the hosts beside see them too.
        (asked(200, 20), Old(beside=asked(200, 22)), Healthy),
        (asked(200, 20, "refused"), Old(beside=asked(200, 18, "refused")), Healthy),
        (asked(200, 20, "refused"), Old(beside=asked(200, 18)), Healthy),  # refused now what failed before: no worse
        # The new version alone fails, or refuses: a smaller vocabulary.
        (asked(200, 20), Old(beside=asked(200)), Harm),
        (asked(200, 20, "refused"), Old(beside=asked(200)), Harm),
        (asked(20, 20), Old(beside=asked(200, 20)), Harm),
        # A difference that chance could make holds; one that does not matter passes.
        (asked(60, 6), Old(beside=asked(60, 0)), Healthy),
        (asked(100, 9), Old(beside=asked(100, 0)), Inconclusive),
        (asked(10_000, 80), Old(beside=asked(10_000)), Healthy),
        # Nothing beside: what the old one served before may have had other clients.
        (asked(200, 20), Old(before=asked(200, 19)), Healthy),
        (asked(200, 20), Old(before=asked(2_000, 1)), Inconclusive),
        (asked(200, 20), Old(beside=asked(5), before=asked(2_000, 1)), Inconclusive),
        (asked(200, 20), Old(beside=asked(200, 21), before=asked(2_000, 1)), Healthy),
        # Nothing at all to compare with: failures inside hold, refusals are what a contract is for.
        (asked(200, 20), Old(), Inconclusive),
        (asked(200, 20, "refused"), Old(), Healthy),
        (asked(200, 1), Old(), Healthy),
        (NOTHING, Old(), Healthy),
    ],
)
def test_the_table(new: Counts, old: Old, found: type) -> None:
    """What the numbers of one host mean."""
    assert type(verdict(new, old)) is found


def test_the_worst_host_decides() -> None:
    """Whatever their order; the reason names the host and both sides' numbers."""
    wave = [Sample("a", asked(200)), Sample("b", asked(100, 3)), Sample("c", asked(200, 30))]
    for order in (wave, wave[::-1]):
        finding = judge(order, Old(beside=asked(400, 1)), SETTINGS)
        assert isinstance(finding, Harm)
        assert "host c: 30 of 200" in finding.reason
        assert "1 of 400" in finding.reason


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60), st.integers(1, 60))
def test_the_tail_is_fishers(failed: int, old_failed: int, answered: int, old_answered: int) -> None:
    """Equal to the sum of hypergeometric terms, which integers give exactly."""
    new, old = failed + answered, old_failed + old_answered
    total = failed + old_failed
    exact = sum(comb(new, k) * comb(old, total - k) for k in range(failed, min(total, new) + 1)) / comb(
        new + old, total
    )
    assert tail(failed, new, old_failed, old) == pytest.approx(exact, rel=1e-6)


def test_large_counts_are_no_trouble() -> None:
    """Millions of requests, and counts that only one side has."""
    assert tail(100_000, 1_000_000, 99_900, 1_000_000) > 0.3
    assert tail(102_000, 1_000_000, 100_000, 1_000_000) < 1e-5
    assert tail(0, 100, 0, 100) == 1.0
    assert 0 <= tail(100, 100, 0, 10**9) < 1e-100
    assert tail(60, 60, 60, 60) == 1.0


def test_bad_clients_alone_roll_back_nothing_however_often_it_looks() -> None:
    """Of 100 bakes with 10% bad clients on both sides, looked at every fifth request, none is rolled back; where the
    new version alone fails on them, every one is."""
    rng = random.Random(7)
    for _ in range(100):
        same, worse = _bake(rng, 0.1), _bake(rng, 0.0)
        assert not any(isinstance(finding, Harm) for finding in same)
        assert any(isinstance(finding, Harm) for finding in worse)


def _bake(rng: random.Random, old_rate: float, requests: int = 300) -> list[object]:
    new = old = 0
    findings: list[object] = []
    for number in range(1, requests + 1):
        new, old = new + (rng.random() < 0.1), old + (rng.random() < old_rate)
        if number % 5 == 0:
            findings.append(verdict(asked(number, new), Old(beside=asked(number, old))))
    return findings


def test_counting_that_began_anew_is_counted_whole() -> None:
    """A difference to an earlier count; a smaller count than before is of another assignment."""
    assert asked(30, 3) - asked(20, 1) == asked(10, 2)
    assert asked(5, 1) - asked(20, 1) == asked(5, 1)
