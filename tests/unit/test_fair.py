"""Nobody waits for the end of somebody else's crowd, and memory is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weighbridge.daemon import looks as looks_module
from weighbridge.daemon.fair import FairQueue
from weighbridge.daemon.layout import Group
from weighbridge.daemon.looks import CROWD, Looks, Urgency, order

GOOD = Group("good", "good/a.safetensors")


def junk(count: int, model: str = "junk") -> list[Group]:
    return [Group(model, f"{model}/{number}.safetensors") for number in range(count)]


def turns(queue: FairQueue, wanted: Group) -> int:
    """How many turns others have before it."""
    for number in range(len(queue)):
        if queue.take() == wanted:
            return number
    raise AssertionError("it is not in the queue")


@pytest.mark.parametrize(
    "crowd",
    [junk(5000), [Group(f"m{n}", f"m{n}/x.pt") for n in range(5000)],
     [Group(f"m{n % 500}", f"m{n % 500}/{n}.pt") for n in range(5000)], junk(5000, "good")],
    ids=["one model", "a model each", "ten a model", "its own model"],
)  # fmt: skip
@pytest.mark.parametrize("begun", [0, 1, 2, 700])
def test_who_comes_last_waits_for_a_few(crowd: list[Group], begun: int) -> None:
    """However the crowd is made, and wherever the queue is with it."""
    queue = FairQueue(10_000)
    for group in crowd:
        queue.put(group)
    for _ in range(begun):
        queue.take()
    queue.put(GOOD)
    assert turns(queue, GOOD) <= 6


def test_who_came_first_is_not_put_off() -> None:
    """Newcomers at every turn hold up nobody for ever."""
    queue = FairQueue(10_000)
    queue.put(GOOD)
    for number in range(20):
        queue.put(Group(f"late{number}", f"late{number}/x.pt"))
        if queue.take() == GOOD:
            return
    raise AssertionError("newcomers only")


def test_one_listing_keeps_its_order() -> None:
    """A batch is taken in the order in which it was put, from both ends."""
    queue, groups = FairQueue(100), junk(10)
    for group in groups:
        queue.put(group, 7)
    assert [queue.take() for _ in groups] == groups
    assert queue.take() is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), max_size=80), st.integers(1, 10))
def test_a_full_queue_drops_and_loses_nothing_else(puts: list[tuple[int, int]], capacity: int) -> None:
    """Every group that was put comes out, or was dropped, exactly as often."""
    queue, inside = FairQueue(capacity), list[Group]()
    for model, number in puts:
        group = Group(f"m{model}", f"m{model}/{number}")
        inside.append(group)
        if (gone := queue.put(group)) is not None:
            inside.remove(gone)
        assert len(queue) == len(inside) <= capacity
    while (taken := queue.take()) is not None:
        inside.remove(taken)
    assert inside == []
    assert len(queue) == 0


def test_who_floods_loses_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the capacity it is the crowd's hints that go; the next listing finds what they meant."""
    monkeypatch.setattr(looks_module, "CAPACITY", 100)
    looks = Looks(0.25, 30)
    looks.hint(GOOD, 0)
    for group in junk(5000):
        looks.hint(group, 0)
    assert len(looks) <= 101
    taken = {looks.take(0) for _ in range(len(looks))}
    assert GOOD in taken
    assert looks.take(0) is None
    assert not looks._lines["junk"].unknown or all(group in looks._states for group in looks._lines["junk"].unknown)


def test_each_urgency_has_its_share() -> None:
    """An event is answered at once beside the findings of a listing, and those go on beside a flood of events."""
    looks = Looks(0.25, 30)
    for number, group in enumerate(junk(9000)):
        looks.hint(group, 0, order(number, group.path), Urgency.FOUND, 1)
    looks.hint(GOOD, 0)
    assert GOOD in [looks.take(0) for _ in range(3)]
    for group in junk(9000, "flood"):
        looks.hint(group, 1)
    models = [group.model for group in (looks.take(1) for _ in range(20)) if group is not None]
    assert {"junk", "flood"} == set(models)


def test_what_waits_in_crowds_is_left_to_the_listings() -> None:
    """Memory for a thousand: the others' rows say why they wait, and listings come back to them."""
    looks = Looks(0.25, 30)
    for group in junk(3000):
        looks.hint(group, 0)
        assert looks.take(0) == group
        looks.again(group, 0)
    assert len(looks) == looks_module.PARKED


def test_in_a_crowd_only_what_is_whole_is_waited_for() -> None:
    """Of ten thousand files of one model, which may all be older, none that nobody looked at holds up a good one."""
    looks = Looks(0.25, 30)
    for number, group in enumerate(junk(CROWD + 10, "good")):
        looks.hint(group, 0, order(number, group.path), Urgency.FOUND, 1)
    looks.hint(GOOD, 0)
    while looks.take(0) != GOOD:
        pass
    young = order(1e6, GOOD.path)
    looks.place(GOOD, young)
    held = next(group for group, state in looks._states.items() if state.in_hand and group != GOOD)
    assert looks.older(GOOD, young, 0) > 0, "one that is being looked at just now may be the older one"
    for group in [group for group, state in looks._states.items() if state.in_hand and group not in (GOOD, held)]:
        looks.again(group, 0)
    looks.place(held, order(0, held.path))
    assert looks.older(GOOD, young, 1) > 0, "an older one is whole, and is going to be recorded"
    looks.forget(held, 1)
    assert looks.older(GOOD, young, 1) == 0


def test_what_a_good_one_waits_for_is_looked_at_next() -> None:
    """An older one of its model that only a listing found would else stand behind everybody's junk."""
    looks, older = Looks(0.25, 30), Group("good", "good/older.safetensors")
    for number, group in enumerate(junk(5000)):
        looks.hint(group, 0, order(number, group.path), Urgency.FOUND, 1)
    looks.hint(older, 0, order(1, older.path), Urgency.FOUND, 1)
    looks.hint(GOOD, 0)
    while looks.take(0) != GOOD:
        pass
    looks.place(GOOD, order(2, GOOD.path))
    assert looks.older(GOOD, order(2, GOOD.path), 0) > 0
    assert older in [looks.take(0) for _ in range(3)]
