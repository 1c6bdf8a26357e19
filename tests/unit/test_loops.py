"""How a loop turns, fails and ends."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from weighbridge.daemon.loops import BACKOFF_FIRST, BACKOFF_MAX, Loop, Turning
from weighbridge.storage.errors import AccessDenied


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Script:
    """A step that does what its list says: an error is raised, a number returned."""

    name = "script"

    def __init__(self, *turns: float | Exception) -> None:
        self.turns = list(turns)
        self.turned = threading.Event()

    def once(self, turning: Turning) -> float:
        turn = self.turns.pop(0) if self.turns else 60.0
        self.turned.set()
        if isinstance(turn, Exception):
            raise turn
        return turn


def test_an_error_backs_off_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """The same cause is one line, without a traceback when a part is only away; its end is another."""
    away = [AccessDenied("s3://b refused the key") for _ in range(8)]
    loop = Loop(Script(*away, 1.0), clock=Clock())
    with caplog.at_level(logging.INFO):
        pauses = [loop.turn() for _ in range(9)]
    assert pauses[:3] == [BACKOFF_FIRST, 2 * BACKOFF_FIRST, 4 * BACKOFF_FIRST]
    assert pauses[7:] == [BACKOFF_MAX, 1.0]
    said = [record for record in caplog.records if record.name.startswith("weighbridge")]
    assert [record.levelname for record in said] == ["WARNING", "INFO"]
    assert "s3://b refused the key" in said[0].getMessage()
    assert not said[0].exc_info


def test_a_fault_of_ours_comes_with_its_traceback_and_the_loop_lives(caplog: pytest.LogCaptureFixture) -> None:
    """No exception ends a loop."""
    loop = Loop(Script(ZeroDivisionError("oops"), 1.0), clock=Clock())
    loop.turn()
    assert caplog.records[-1].exc_info
    assert loop.health().failing == "ZeroDivisionError: oops"
    assert loop.turn() == 1.0
    assert not loop.health().failing


def test_health_counts_lateness_and_not_rest() -> None:
    """A loop that sleeps is well; one whose turn does not come is late; a sign of life counts."""
    clock = Clock()
    loop = Loop(Script(60.0), clock=clock)
    loop.turn()
    clock.now += 59
    assert loop.health().late == 0
    clock.now += 11
    assert loop.health().late == 10
    loop.beat()
    assert loop.health().late == 0


def test_waking_turns_it_at_once_and_stopping_ends_it() -> None:
    """No pause is waited out."""
    step = Script(60.0, 60.0)
    loop = Loop(step, threads=2)
    loop.start()
    assert step.turned.wait(60)
    while step.turns:  # both threads had their first turn
        assert step.turned.wait(60)
    step.turned.clear()
    loop.wake()
    assert step.turned.wait(60)
    loop.stop()
    assert loop.join(time.monotonic() + 5)


def test_a_bell_does_not_shorten_a_backoff() -> None:
    """Rings during a failure would make a busy loop of it."""
    step = Script(*[AccessDenied("no")] * 1000)
    loop = Loop(step)
    loop.start()
    assert step.turned.wait(60)
    for _ in range(100):
        loop.wake()
    loop.stop()
    assert loop.join(time.monotonic() + 5)
    assert len(step.turns) >= 998
