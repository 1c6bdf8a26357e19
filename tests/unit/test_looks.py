"""When a checkpoint is looked at, with a passed clock."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from weighbridge.daemon.layout import Group
from weighbridge.daemon.looks import PATIENCE, REST, Looks, order

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


C = Group("m", "m/c.safetensors")
OTHER = Group("n", "n/a.safetensors")


def test_step_numbers_are_numbers() -> None:
    """By time first; of one moment, `step-900` before `step-1000`."""
    paths = [f"m/step-{number}/" for number in (800, 900, 1000, 1100)]
    assert sorted([paths[n] for n in (3, 0, 2, 1)], key=lambda path: order(5.0, path)) == paths
    assert order(4.0, "m/z") < order(5.0, "m/a")


def test_older_ones_of_a_model_are_recorded_first() -> None:
    """What may be older, since nobody has looked at it yet, is waited for; what proves younger, or waits, is not."""
    looks = Looks(0.25, 30)
    for group in (A, B, C, OTHER):
        looks.hint(group, 0)
        assert looks.take(0) == group
    assert looks.older(OTHER, order(9, OTHER.path), 0) == 0
    assert looks.older(B, order(2, B.path), 0) > 0
    looks.place(A, order(1, A.path))
    looks.place(C, order(3, C.path))
    assert looks.older(C, order(3, C.path), 1) > 0
    assert looks.older(B, order(2, B.path), 1) > 0
    assert looks.older(A, order(1, A.path), 1) == 0
    looks.forget(A, 1)
    assert looks.older(B, order(2, B.path), 1) == 0
    looks.again(B, 1)
    assert looks.older(C, order(3, C.path), 1) == 0


def test_a_hint_that_tells_the_order_holds_up_only_what_is_younger() -> None:
    """A listing knows when weights were written before anybody looks."""
    looks = Looks(0.25, 30)
    looks.hint(A, 0, order(1, A.path))
    looks.hint(B, 0, order(3, B.path))
    looks.hint(C, 0)
    for _ in range(3):
        looks.take(0)
    looks.place(C, order(2, C.path))
    assert looks.older(C, order(2, C.path), 0) > 0
    looks.forget(A, 0)
    assert looks.older(C, order(2, C.path), 0) == 0


def test_what_is_hinted_later_holds_up_nothing() -> None:
    """Else a stream of new checkpoints would put the first one off for ever."""
    looks = Looks(0.25, 30)
    looks.hint(B, 0)
    looks.take(0)
    assert looks.older(B, order(2, B.path), 1) == 0
    looks.hint(A, 2)
    looks.take(2)
    assert looks.older(B, order(2, B.path), 3) == 0


def test_patience_ends() -> None:
    """An older one that never settles does not hold up the younger for ever."""
    looks = Looks(0.25, 30)
    for group in (A, B):
        looks.hint(group, 0)
        looks.take(0)
    looks.place(A, order(1, A.path))
    assert looks.older(B, order(2, B.path), 0) > 0
    assert looks.older(B, order(2, B.path), PATIENCE - 1) > 0
    assert looks.older(B, order(2, B.path), PATIENCE) == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["hint", "place", "take", "again", "again_in", "forget"]), st.sampled_from([A, B, C])
        ),
        max_size=80,
    )
)
def test_somebody_is_always_next(steps: list[tuple[str, Group]]) -> None:
    """After any history at least one of those in hand may be recorded: none waits for one that waits for it."""
    looks, now = Looks(0.25, 30), 0.0
    held: set[Group] = set()
    for what, group in steps:
        now += 1
        if what == "hint":
            looks.hint(group, now)
        elif what == "take" and (taken := looks.take(now)) is not None:
            held.add(taken)
        elif group in held and what == "place":
            looks.place(group, order(now % 7, group.path))
        elif group in held and what in ("again", "forget", "again_in"):
            held.discard(group)
            looks.again_in(group, 1, now) if what == "again_in" else getattr(looks, what)(group, now)
    now += 60  # those that were put back are due
    while (taken := looks.take(now)) is not None:
        held.add(taken)
        now += 60
    for group in held:
        looks.place(group, order(1, group.path))
    assert not held or any(looks.older(group, order(1, group.path), now) == 0 for group in held)
