"""kill -9 of any process in mid-job, a broker that forgets everything, everybody racing: each version ends once."""

from __future__ import annotations

import pytest
from fixtures.plant import Plant
from fixtures.running import START_SECONDS
from fixtures.worker import until

pytestmark = pytest.mark.slow

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@on_sqlite
def test_whatever_is_killed_in_mid_job_the_version_ends_once(plant: Plant) -> None:
    """The registry, the daemon, the broker and the worker, one after the other while one job runs: another attempt only
    for the worker's, and what was dropped meanwhile is found."""
    registry, daemon, worker = plant.start_registry(), plant.start("daemon"), plant.start_worker(concurrency=1)
    plant.watch()
    plant.drop("slow/one.safetensors")
    until("the stage runs", lambda: plant.log() == ["start 1 1"], START_SECONDS)

    plant.kill(registry)
    plant.kill(daemon)
    plant.drop("slow/two.safetensors")
    plant.start("daemon")
    plant.start_registry()
    until("the second is found", lambda: len(plant.versions()) == 2, START_SECONDS)
    plant.valkey.kill()
    plant.drop("slow/three.safetensors")
    plant.valkey.start()
    until("the third is found", lambda: len(plant.versions()) == 3, START_SECONDS)
    assert plant.log() == ["start 1 1"]
    worker.kill()
    plant.start_worker()
    (plant.folder / "go").touch()

    plant.await_ready(3, START_SECONDS)
    plant.assert_once(3, attempts=2)
    assert "end 1 2" in plant.log()


@on_sqlite
def test_a_broker_flushed_with_jobs_in_flight(plant: Plant) -> None:
    """FLUSHALL while one job runs and the messages of others wait: they are sent again, and each runs once."""
    plant.start_registry()
    plant.start("daemon")
    plant.start_worker(concurrency=1)
    plant.watch()
    plant.drop("slow/one.safetensors")
    until("the stage runs", lambda: plant.log() == ["start 1 1"], START_SECONDS)
    plant.drop(*(f"quick/{number}.safetensors" for number in range(12)))
    until("all are found", lambda: len(plant.versions()) == 13, START_SECONDS)
    with plant.valkey.client() as client:
        until("messages wait", lambda: client.llen(f"{plant.broker.channel}.cpu") >= 10)
        client.flushall()
    (plant.folder / "go").touch()
    plant.await_ready(13, START_SECONDS)
    plant.assert_once(13)


def test_two_daemons_and_two_workers_race(plant: Plant) -> None:
    """On SQLite and PostgreSQL: every job runs once, no version is stuck, and the watcher misses no event."""
    plant.start_registry()
    plant.watch()
    plant.drop(*(f"early/{number}.safetensors" for number in range(15)))
    for _ in range(2):
        plant.start("daemon")
        plant.start_worker()
    plant.drop(*(f"late/{number}.safetensors" for number in range(15)))
    plant.await_ready(30, START_SECONDS)
    plant.assert_once(30)
