"""When a checkpoint is looked at, with a passed clock."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from weighbridge.daemon.layout import Group
from weighbridge.daemon.looks import REST, Looks

A, B = Group("m", "m/a.safetensors"), Group("m", "m/b/")


def test_a_thousand_hints_are_one_look() -> None:
    """Hints before a look are all answered by it."""
    looks = Looks(0.25, 30)
    for number in range(1000):
        looks.hint(A, number / 1000)
    assert looks.take(1.0) == A
    assert looks.take(1.0) is None
    looks.forget(A, 1.0)
    assert len(looks) == 0
    assert looks.next_due() == inf


def test_what_waits_is_looked_at_with_growing_pauses() -> None:
    """Each pause is twice the one before, up to the longest."""
    looks, now, pauses = Looks(0.25, 2), 0.0, []
    looks.hint(A, now)
    for _ in range(6):
        assert looks.take(now) == A
        looks.again(A, now)
        pauses.append(looks.next_due() - now)
        now = looks.next_due()
    assert pauses == [0.25, 0.5, 1, 2, 2, 2]


def test_a_hint_shortens_the_pause_and_starts_it_anew() -> None:
    """Something happened there: look as soon as it rested, and often again."""
    looks, now = Looks(0.25, 30), 0.0
    looks.hint(A, now)
    for _ in range(5):
        now = looks.next_due()
        looks.take(now)
        looks.again(A, now)
    assert looks.next_due() - now == 4
    looks.hint(A, now + 1)
    assert looks.next_due() == now + 1
    looks.take(now + 1)
    looks.again(A, now + 1)
    assert looks.next_due() - (now + 1) == 0.25


def test_a_hint_during_a_look_brings_another_look() -> None:
    """What the look may have missed is not lost, whatever the look decided."""
    looks = Looks(0.25, 30)
    looks.hint(A, 0)
    assert looks.take(0) == A
    looks.hint(A, 0.001)
    assert looks.take(0.002) is None, "it is in somebody's hand"
    looks.forget(A, 0.002)
    assert looks.next_due() == 0.002 + REST
    assert looks.take(0.1) == A


def test_a_storm_of_hints_is_no_storm_of_looks() -> None:
    """Looks rest as long as they took, so that at most half of the time is spent on one writer."""
    looks = Looks(0.25, 30)
    looks.hint(A, 0)
    looks.take(0)
    looks.hint(A, 1)
    looks.again(A, 2)
    assert looks.next_due() == 4


def test_others_are_not_held_up() -> None:
    """One in hand leaves the rest to other hands."""
    looks = Looks(0.25, 30)
    looks.hint(A, 0)
    looks.hint(B, 0)
    assert {looks.take(0), looks.take(0)} == {A, B}


def test_quiet_is_measured_from_the_first_look_that_saw_it_so() -> None:
    """A change begins it anew."""
    looks = Looks(0.25, 30)
    looks.hint(B, 0)
    looks.take(0)
    assert looks.unchanged(B, "one", 0) == 0
    looks.again_in(B, 0.5, 0)
    assert looks.next_due() == 0.5
    looks.take(0.5)
    assert looks.unchanged(B, "one", 0.5) == 0.5
    assert looks.unchanged(B, "two", 0.6) == 0


@given(st.lists(st.tuples(st.sampled_from(["hint", "take", "again", "forget"]), st.sampled_from([A, B])), max_size=60))
def test_no_hint_is_ever_lost(steps: list[tuple[str, Group]]) -> None:
    """After any history a group that was hinted at later than its last look began is due within the rest."""
    looks, now = Looks(0.25, 30), 0.0
    held: set[Group] = set()
    open_hints: set[Group] = set()
    for what, group in steps:
        now += 0.001
        if what == "hint":
            looks.hint(group, now)
            open_hints.add(group)
        elif what == "take" and (taken := looks.take(now)) is not None:
            held.add(taken)
            open_hints.discard(taken)
        elif what in ("again", "forget") and group in held:
            held.discard(group)
            getattr(looks, what)(group, now)
    for group in list(held):
        looks.forget(group, now)
    found = set()
    while (due := looks.next_due()) <= now + 1:
        taken = looks.take(due)
        assert taken is not None
        found.add(taken)
        looks.forget(taken, due)
    assert open_hints <= found
