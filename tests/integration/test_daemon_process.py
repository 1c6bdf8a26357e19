"""The daemon as a process: what is away at its start and later, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.broker import Valkey
from fixtures.checkpoints import safetensors
from sqlmodel import select

from weighbridge.registry.db import Database
from weighbridge.registry.models import Checkpoint, Job


def await_(condition: Callable[[], bool], what: str, seconds: float = 100.0) -> None:
    """Poll another process until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: it did not come in time"
        time.sleep(0.02)


@pytest.mark.slow
def test_parts_that_are_away_are_waited_for_and_the_end_is_clean(tmp_path: Path, valkey: Valkey) -> None:
    """No schema at the start, no folder, no broker: each is one clear line, and it goes on when they are there."""
    drops, log, database = tmp_path / "drops", tmp_path / "log", tmp_path / "data" / "registry.db"
    database.parent.mkdir()
    valkey.stop()
    config = tmp_path / "weighbridge.toml"
    config.write_text(
        f"data = {json.dumps(str(tmp_path / 'data'))}\n"
        f"storage.url = {json.dumps(str(drops))}\n"
        f"registry.database = {json.dumps(f'sqlite:///{database}')}\n"
        f"broker.url = {json.dumps(valkey.url)}\n"
    )
    command = [sys.executable, "-m", "weighbridge.cli", "--config", str(config), "daemon"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHBRIDGE_")}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as daemon:
        try:
            await_(lambda: "schema is at revision none" in log.read_text(), "the database is named")
            db = Database(f"sqlite:///{database}")
            db.upgrade()
            await_(lambda: f"BucketNotFound: there is no folder {drops}" in log.read_text(), "the folder is named")
            (drops / "digits").mkdir(parents=True)
            (drops / "digits" / "a.safetensors").write_bytes(safetensors())
            await_(lambda: states(db) == ["complete"], "it goes on when the folder is there")
            await_(lambda: "broker is away" in log.read_text(), "the broker is named")
            await_(lambda: jobs(db)[0].sent_at is None, "it does not count as sent")
            valkey.start()
            with valkey.client() as client:
                await_(lambda: client.llen("weighbridge.cpu") == 1, "it goes on when the broker is there")
            db.close()
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(10) == 0
        finally:
            daemon.kill()
    text = log.read_text()
    assert "Traceback" not in text
    for loop in ("listing", "watch"):
        said = f"{loop}: BucketNotFound: there is no folder {drops};"
        assert text.count(said) <= 1, "each loop says a cause once"


def jobs(db: Database) -> list[Job]:
    with db.read() as tx:
        return list(tx.scalars(select(Job)))


def states(db: Database) -> list[str]:
    with db.read() as tx:
        return [row.state for row in tx.scalars(select(Checkpoint))]
