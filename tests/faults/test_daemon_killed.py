"""kill -9 of the daemon at any moment: a version once, as it would have been."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from fixtures.checkpoints import safetensors, sharded
from fixtures.watched import Watched

from weighbridge.registry.db import Database
from weighbridge.storage.folder import FolderStore

CHECKPOINTS = 30


def victim(root: str, url: str, began: Connection) -> None:
    """A daemon's intake over everything there, until somebody kills it."""
    db = Database(url)
    watched = Watched(FolderStore(root, durable=False), db)
    began.send(True)
    while True:
        watched.list()
        watched.settle(5)


def drop(store: FolderStore) -> None:
    for number in range(CHECKPOINTS - 1):
        store.put(f"digits/{number:02}.safetensors", safetensors())
    for name, data in sharded().items():
        store.put(f"digits/run/{name}", data)


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_killed_in_mid_look_again_and_again_each_checkpoint_is_one_version(
    request: pytest.FixtureRequest, dialect: str, tmp_path: Path
) -> None:
    """Two daemons at a time, each killed at a random moment; the one after them finishes: none lost, none twice."""
    url: str = request.getfixturevalue(f"{dialect}_url")
    store = FolderStore(tmp_path / "drops", create=True, durable=False)
    drop(store)
    chance = random.Random(4)
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        ear, mouth = fork.Pipe()
        victims = [fork.Process(target=victim, args=(str(store.root), url, mouth)) for _ in range(2)]
        for process in victims:
            process.start()
        for _began in victims:
            assert ear.poll(30)
            ear.recv()
        for process in victims:
            time.sleep(chance.random() * 0.06)  # not a synchronisation: the moment of the fault
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join(10)
        ear.close()
        mouth.close()
    db = Database(url)
    watched = Watched(store, db)
    watched.list()
    watched.settle(5)
    versions = watched.versions()
    assert len(versions) == len({version.path for version in versions}) == CHECKPOINTS
    assert [version.number for version in versions] == list(range(1, CHECKPOINTS + 1))
    assert sorted(job.key for job in watched.jobs()) == sorted(f"version:{v.id}:validate:1" for v in versions)
    assert len(watched.events("version.recorded")) == CHECKPOINTS
    assert {state for state, _ in watched.states().values()} == {"complete"}
    db.close()
