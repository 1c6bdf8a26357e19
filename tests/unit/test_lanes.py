"""Few looks at once, and those that hang leave room for the others."""

from __future__ import annotations

import pytest

from weighbridge.daemon.lanes import HANGS, QUICK, THREADS, Lanes
from weighbridge.daemon.layout import Group
from weighbridge.daemon.looks import CROWD, Looks, Urgency, order


def group(number: int, model: str = "") -> Group:
    model = model or f"m{number}"
    return Group(model, f"{model}/{number}.safetensors")


def test_quick_looks_are_few() -> None:
    """The next one begins when one of them ends, or hangs."""
    lanes = Lanes()
    for number in range(QUICK):
        assert lanes.free_at() < 0
        lanes.begin(group(number), float(number), hung=False)
    assert lanes.free_at() == HANGS
    assert lanes.end(group(1), 1.1) is False
    assert lanes.free_at() < 0


def test_there_is_an_end_of_hanging_ones() -> None:
    """Then all that is left is to wait for one of them."""
    lanes = Lanes()
    for number in range(THREADS):
        assert lanes.free_at() <= number
        lanes.begin(group(number), float(number), hung=False)
    assert lanes.free_at() == float("inf")
    assert lanes.end(group(0), 500) is True
    assert lanes.free_at() < 500


def test_what_hung_before_and_one_models_leave_lanes_to_others() -> None:
    """A newcomer is admitted, whatever the known ones do."""
    lanes, again = Lanes(), 0
    while lanes.admits(group(again), 0, hung=True):
        lanes.begin(group(again), 0, hung=True)
        again += 1
    assert lanes.admits(group(again), 0, hung=False)
    while lanes.admits(group(again, "crowd"), 9, hung=False):
        lanes.begin(group(again, "crowd"), 0, hung=False)
        again += 1
    assert again < THREADS
    assert lanes.admits(group(again), 9, hung=False)


@pytest.mark.parametrize("crowd", [0, 2 * CROWD])
def test_nobody_waits_for_what_hangs(crowd: int) -> None:
    """A younger one of the model is recorded although nobody knows what the older one is; in a crowd too."""
    looks, old, new = Looks(0.25, 30), group(1, "m"), group(2, "m")
    for one in (old, new):
        looks.hint(one, 0)
        assert looks.take(0) == one
    for number in range(crowd):
        looks.hint(group(10 + number, "m"), 0, order(3, "m/x"))
    looks.place(new, order(2, new.path))
    assert looks.older(new, order(2, new.path), HANGS / 2) > 0
    assert looks.older(new, order(2, new.path), HANGS) == 0


def test_what_is_put_off_comes_again() -> None:
    """More that hung before than have lanes: each is looked at when one ends."""
    looks, groups = Looks(0.25, 30), [group(number) for number in range(20)]
    for one in groups:
        looks.hint(one, 0)
        assert looks.take(0) == one
        looks.again(one, 100)
    now, taken = 200.0, list[Group]()
    while (one := looks.take(now)) is not None or looks.next_due() < 210:
        if one is not None:
            taken.append(one)
        else:
            now = looks.next_due()
    assert 0 < len(taken) < len(groups)
    for one in taken:
        looks.forget(one, now)
    left = []
    while (one := looks.take(now + 100)) is not None:
        left.append(one)
        looks.forget(one, now + 100)
    assert set(left) == set(groups) - set(taken)


def test_what_nobody_waits_for_leaves_the_processor_to_others() -> None:
    """It rests for as long as looks worked; what somebody waits for does not, and its own work counts too."""
    looks, found, told = Looks(0.25, 30), group(1), group(2)
    looks.spent(2.0, 100)
    looks.hint(found, 100, urgency=Urgency.FOUND)
    assert looks.take(100) is None
    assert looks.next_due() == 102
    looks.hint(told, 100)
    assert looks.next_due() == 100
    assert looks.take(100) == told
    looks.spent(1.0, 101)
    assert looks.take(102.5) is None
    assert looks.take(103) == found
