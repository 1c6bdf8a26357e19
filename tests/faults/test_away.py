"""What everything stands on goes away and comes back: clear words, nothing lost, and it goes on by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from fixtures.broker import Valkey
from fixtures.checkpoints import safetensors
from fixtures.plant import Plant
from fixtures.postgres import PostgresServer
from fixtures.running import START_SECONDS
from fixtures.worker import StartWorker, until
from pydantic import SecretStr

from weighbridge.storage.seaweed import SeaweedServer

if TYPE_CHECKING:
    from pathlib import Path

    from mypy_boto3_s3 import S3Client

pytestmark = pytest.mark.slow

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def own_postgres(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may stop and start again (the session's says whether there is one)."""
    server = PostgresServer().start()
    yield server
    server.stop()


def test_the_database_stops_in_mid_job_and_is_started_again(
    own_postgres: PostgresServer, tmp_path: Path, valkey: Valkey, start_worker: StartWorker
) -> None:
    """Registry, daemon and worker all outlive it; the job that ran meanwhile ends once, and what was dropped meanwhile
    is found."""
    own_postgres.execute("CREATE DATABASE plant")
    plant = Plant(tmp_path, own_postgres.url("plant"), valkey, start_worker)
    try:
        registry, daemon = plant.start_registry(), plant.start("daemon")
        worker = plant.start_worker(concurrency=1)
        plant.drop("slow/one.safetensors")
        until("the stage runs", lambda: plant.log() == ["start 1 1"], START_SECONDS)
        own_postgres.interrupt()
        plant.drop("slow/two.safetensors")
        plant.await_said("daemon", f"database {own_postgres.url('plant')}")
        assert plant.versions() == []
        own_postgres.start()
        (plant.folder / "go").touch()
        plant.await_ready(2, START_SECONDS)
        assert [process.poll() for process in (registry, daemon, worker.process)] == [None] * 3
        jobs = [job for number in (1, 2) for job in plant.client.version("slow", number).jobs]
        assert [job.state for job in jobs] == ["done"] * 4
        assert "Traceback" not in plant.log_of("daemon").read_text()
    finally:
        plant.close()


@on_sqlite
def test_a_bucket_that_is_not_there_yet_and_one_that_disappears(
    plant: Plant, seaweedfs: SeaweedServer, s3_client: S3Client
) -> None:
    """Both are named; a version outlives its bucket; when the bucket is there everything in it is found."""
    plant.configure(**s3(seaweedfs, "late"))
    plant.start_registry()
    plant.start("daemon")
    plant.start_worker()
    plant.await_said("daemon", "BucketNotFound: s3://late")

    s3_client.create_bucket(Bucket="late")
    s3_client.put_object(Bucket="late", Key="digits/a.safetensors", Body=safetensors())
    plant.await_ready(1, START_SECONDS)

    s3_client.delete_object(Bucket="late", Key="digits/a.safetensors")
    s3_client.delete_bucket(Bucket="late")
    until("it says so again", lambda: plant.log_of("daemon").read_text().count("BucketNotFound") > 1, START_SECONDS)
    assert [version.status for version in plant.versions()] == ["ready"]
    s3_client.create_bucket(Bucket="late")
    s3_client.put_object(Bucket="late", Key="digits/b.safetensors", Body=safetensors())
    plant.await_ready(2, START_SECONDS)
    assert "Traceback" not in plant.log_of("daemon").read_text()


@on_sqlite
def test_wrong_credentials(plant: Plant, seaweedfs: SeaweedServer, s3_bucket: str, s3_client: S3Client) -> None:
    """The daemon names the bucket and what is wrong, never the key; another with the right ones finds everything."""
    s3_client.put_object(Bucket=s3_bucket, Key="digits/a.safetensors", Body=safetensors())
    wrong = "a-secret-that-is-wrong"
    plant.configure(**s3(seaweedfs, s3_bucket, secret_key=wrong))
    plant.start_registry()
    daemon = plant.start("daemon")
    plant.await_said("daemon", f"AccessDenied: s3://{s3_bucket}")
    assert wrong not in plant.log_of("daemon").read_text()
    assert plant.versions() == []
    assert daemon.poll() is None

    plant.configure(**s3(seaweedfs, s3_bucket))
    plant.start("daemon")
    plant.start_worker()
    plant.await_ready(1, START_SECONDS)
    assert "Traceback" not in plant.log_of("daemon").read_text()


def s3(server: SeaweedServer, bucket: str, **other: str) -> dict[str, object]:
    """The settings of a bucket on the server."""
    options = server.options
    keys = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in options.model_dump(exclude_unset=True).items()
    }
    return {"url": f"s3://{bucket}", "s3": keys | other}
