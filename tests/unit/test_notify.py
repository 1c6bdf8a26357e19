"""Bells: within a process, between processes, and when the broker is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.broker import Valkey

from weighbridge.registry import notify
from weighbridge.registry.notify import Notifier, open_notifier


@pytest.fixture(params=["memory", "valkey"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Notifier, Notifier]]:
    """Two notifiers of the same channel, as of two processes."""
    url = f"memory://{tmp_path}" if request.param == "memory" else request.getfixturevalue("shared_valkey").url
    pair = open_notifier(url, str(tmp_path)), open_notifier(url, str(tmp_path))
    with pair[0].listen("jobs") as first:
        assert request.param == "memory" or first.wait(60), "its connection rings a new bell once"
        yield pair
    for one in pair:
        one.close()


def test_a_ring_is_heard_by_topic(ends: tuple[Notifier, Notifier]) -> None:
    """Once for any number of rings, also of those before the wait; other topics are not heard."""
    here, there = ends
    with here.listen("jobs", "events") as bell, here.listen("hosts") as other:
        there.ring("jobs")
        there.ring("events")
        assert bell.wait(60)
        there.ring("hosts")
        assert other.wait(60)
        bell.wait(0)
        assert not bell.wait(0.02)
    there.ring("jobs")
    assert not bell.wait(0)


def test_a_ring_calls_back(ends: tuple[Notifier, Notifier]) -> None:
    """For event loops, which cannot wait in a thread for each listener."""
    here, there = ends
    called = threading.Event()
    with here.listen("jobs", then=called.set):
        there.ring("jobs")
        assert called.wait(60)


def test_channels_are_apart(ends: tuple[Notifier, Notifier], tmp_path: Path) -> None:
    """Two installations may share a broker."""
    here, _ = ends
    other = open_notifier("memory://", f"{tmp_path}/other")
    with here.listen("jobs") as bell:
        other.ring("jobs")
        assert not bell.wait(0.05)


def test_a_dead_broker_costs_nothing(tmp_path: Path) -> None:
    """Ringing never raises and never waits long; listening waits out its time."""
    dead = open_notifier(f"redis+socket://{tmp_path}/nobody?virtual_host=0", "test")
    began = time.monotonic()
    for _ in range(1000):
        dead.ring("jobs")
    with dead.listen("jobs") as bell:
        assert not bell.wait(0.05)
    dead.close()
    assert time.monotonic() - began < 3


def test_it_hears_again_when_the_broker_is_back(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart every bell is rung once, for what may have been missed, and hears again."""
    valkey.stop()
    monkeypatch.setattr(notify, "_QUIET_SECONDS", 0.02)
    here, there = open_notifier(valkey.url, "test"), open_notifier(valkey.url, "test")
    with here.listen("jobs") as bell:
        for _ in range(2):
            valkey.start()
            assert bell.wait(60)
            deadline = time.monotonic() + 60
            heard = False
            while not heard and time.monotonic() < deadline:
                there.ring("jobs")
                heard = bell.wait(0.05)
            assert heard
            valkey.stop()
            bell.wait(0)
    here.close()
    there.close()


@pytest.mark.parametrize(
    ("celery", "client"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("redis+socket:///run/v.sock?virtual_host=3", "unix:///run/v.sock?db=3"),
        ("redis+socket:///run/v.sock", "unix:///run/v.sock?db=0"),
        ("redis+socket://:secret@/run/v.sock?virtual_host=1", "unix://:secret@/run/v.sock?db=1"),
    ],
)
def test_celerys_socket_urls(celery: str, client: str) -> None:
    """One setting names the broker for Celery and for the bells."""
    assert notify.redis_url(celery) == client
