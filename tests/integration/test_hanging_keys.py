"""A store that does not answer for some keys costs their own looks, and nobody else's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

import pytest
from fixtures.checkpoints import safetensors
from fixtures.watched import Watched
from fixtures.worker import until

from weighbridge.daemon import lanes
from weighbridge.daemon.intake import Intake
from weighbridge.daemon.looks import Looks
from weighbridge.daemon.loops import Loop
from weighbridge.registry.db import Database
from weighbridge.storage.errors import StorageUnavailable
from weighbridge.storage.events import Kind, ObjectEvent
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.protocols import Ref


class Hanging(MemoryStore):
    """Keys with `hang` in their names are not answered until `ends`."""

    def __init__(self) -> None:
        super().__init__()
        self.ends, self.asked = threading.Event(), set[str]()

    def get(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> bytes:
        self._wait(key)
        return super().get(key, start=start, end=end, if_match=if_match)

    def open(self, key: str, *, start: int = 0, end: int | None = None, if_match: Ref | None = None) -> IO[bytes]:
        self._wait(key)
        return super().open(key, start=start, end=end, if_match=if_match)

    def _wait(self, key: str) -> None:
        if "hang" in key:
            self.asked.add(key)
            self.ends.wait()
            raise StorageUnavailable(f"{key}: no answer within 60 s", key=key)


@pytest.fixture
def watched(sqlite_url: str, opened: Callable[[str], Database]) -> Iterator[Watched]:
    """Watched by the daemon's threads."""
    db, store = opened(sqlite_url), Hanging()
    watched = Watched(store, db)
    looks = Looks(0.25, 30.0)
    intake = Intake(store, watched.layout, db, watched.notifier, looks, watched.reading, wake=lambda: loop.wake())
    watched.intake = intake
    loop = Loop(intake, threads=lanes.THREADS)
    loop.start()
    yield watched
    store.ends.set()
    loop.stop()
    assert loop.join(time.monotonic() + 30)
    db.close()


def hanging(watched: Watched, keys: list[str]) -> Hanging:
    """Drop keys that hang, until as many are looked at as ever are."""
    store = watched.store
    assert isinstance(store, Hanging)
    for key in keys:
        store.put(key, safetensors())
        watched.intake.tell(ObjectEvent(Kind.CREATED, key, "test"))
    until("as many looks hang as were held before", lambda: len(store.asked) >= min(len(keys), lanes.QUICK))
    return store


@pytest.mark.parametrize(
    "keys",
    [
        [f"m{number}/hang.safetensors" for number in range(12)],
        [f"other/hang{number}.safetensors" for number in range(200)],
        [f"good/hang{number}.safetensors" for number in range(10)],
    ],
    ids=["many models", "another model", "its own model"],
)
def test_a_good_drop_is_recorded_while_others_hang(keys: list[str], watched: Watched) -> None:
    """Whoever they belong to, and however many of one model; afterwards each has its reason."""
    store = hanging(watched, keys)
    store.put("good/a.safetensors", safetensors({"v": ("U8", [1], b"1")}))
    watched.intake.tell(ObjectEvent(Kind.CREATED, "good/a.safetensors", "test"))
    until("the good one is recorded", lambda: [one.path for one in watched.versions()] == ["good/a.safetensors"])
    assert not store.ends.is_set()
    store.ends.set()
    state, reason = until("the others have reasons", lambda: watched.states().get(keys[0]))
    assert state == "waiting"
    assert "no answer within 60 s" in reason
