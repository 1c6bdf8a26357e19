"""What a restart's reconcile of a settled bucket costs beside the bare listing, in time and memory.

    python benchmarks/reconcile.py [--objects 1000000] [--folder 100000] [--seaweed 20000]

Every checkpoint is recorded as seen before; nothing is new, so nothing is looked at. `synthetic` is a store that makes
its objects up as it lists them: its time per object is the reconcile's own cost, to be set against a real store's. The
ratio counts where objects are really listed (a folder on disk, SeaweedFS over HTTP). Each case runs in its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import insert

from weighbridge.daemon.layout import Group, Layout
from weighbridge.daemon.listing import Listing
from weighbridge.daemon.loops import Idle
from weighbridge.registry.db import Database
from weighbridge.registry.models import Checkpoint
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.protocols import ObjectInfo, PassedOver, Survey

LAYOUT = Layout()
FILES = 4
"""Objects of a checkpoint."""


def key(number: int) -> str:
    checkpoint, file = divmod(number, FILES)
    return f"model-{checkpoint // 10_000:04}/run-{checkpoint:09}/model-{file:05}-of-{FILES:05}.safetensors"


class Synthetic:
    """A store of `count` objects that exist only while they are listed."""

    def __init__(self, count: int) -> None:
        self._count = count

    def survey(self, prefix: str = "") -> Iterator[ObjectInfo | PassedOver]:
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        for number in range(self._count):
            yield ObjectInfo(key(number), 1_000_000 + number, f"{number:032x}", moment)

    def find(self, key: str) -> ObjectInfo | PassedOver | None:
        raise NotImplementedError


def fill_folder(root: Path, count: int) -> FolderStore:
    for number in range(count):
        path = root / key(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return FolderStore(root)


@contextlib.contextmanager
def stores(kind: str, count: int, root: Path) -> Iterator[Survey]:
    """A filled store of that kind."""
    if kind == "synthetic":
        yield Synthetic(count)
    elif kind == "folder":
        yield fill_folder(root / "drops", count)
    else:
        from concurrent.futures import ThreadPoolExecutor

        from weighbridge.storage.s3 import S3Store, new_client
        from weighbridge.storage.seaweed import SeaweedServer

        server = SeaweedServer(root / "seaweed").start()
        try:
            client = new_client(server.options)
            client.create_bucket(Bucket="bench")
            store = S3Store("bench", "", server.options, client=client)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda number: store.put(key(number), b"x"), range(count)))
            yield store
        finally:
            server.stop(grace=0)


def settle(store: Survey, db: Database) -> int:
    """Record everything as seen; return the number of checkpoints."""
    listing = Listing(store, LAYOUT, db, lambda *_: None)
    batch: list[dict[str, Any]] = []
    count = 0

    def flush() -> None:
        nonlocal count
        with db.transaction() as tx:
            tx.execute(insert(Checkpoint), batch)
        count += len(batch)
        batch.clear()

    for group, seen, _ in listing._groups(""):
        batch.append({"model": group.model, "path": group.path, "state": "complete", "seen": seen, "proof": "P2"})
        batch[-1] |= {"reason": "", "revision": 1, "created_at": 0.0, "updated_at": 0.0}
        if len(batch) == 5000:
            flush()
    if batch:
        flush()
    return count


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare(store: Survey) -> None:
    for _ in store.survey(""):
        pass


def case(kind: str, count: int, rounds: int = 3) -> dict[str, Any]:
    """Fill and settle in a child process, so that only the listing's own memory is measured."""
    with tempfile.TemporaryDirectory(prefix="wb-", dir=os.environ.get("TMPDIR")) as name:
        root = Path(name)
        db = Database(f"sqlite:///{root}/registry.db")
        db.upgrade()
        with stores(kind, count, root) as store:
            if (child := os.fork()) == 0:
                own = Database(f"sqlite:///{root}/registry.db")
                settle(store, own)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            hinted: list[Group] = []
            listing = Listing(store, LAYOUT, db, lambda group, *_: hinted.append(group))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            lists, reconciles = [], []
            for _ in range(rounds):
                lists.append(timed(lambda: bare(store)))
                reconciles.append(timed(lambda: listing.run("", Idle())))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        db.close()
    assert not hinted, f"{len(hinted)} looks were asked for, and nothing is new"
    bare_s, reconcile_s = min(lists), min(reconciles)
    return {
        "store": kind,
        "objects": count,
        "bare s": round(bare_s, 2),
        "reconcile s": round(reconcile_s, 2),
        "ratio": round(reconcile_s / bare_s, 2),
        "own µs/object": round((reconcile_s - bare_s) / count * 1e6, 2),
        "peak MiB": round(peak),
        "of it listing MiB": round(peak - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=1_000_000, help="of the synthetic store")
    parser.add_argument("--folder", type=int, default=100_000)
    parser.add_argument("--seaweed", type=int, default=20_000)
    parser.add_argument("--case", nargs=2, metavar=("STORE", "OBJECTS"), help="one case, as JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(options.case[0], int(options.case[1]))))
        return
    header = False
    for kind, count in (("synthetic", options.objects), ("folder", options.folder), ("seaweedfs", options.seaweed)):
        if not count:
            continue
        command = [sys.executable, __file__, "--case", kind, str(count)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        if not header:
            print("  ".join(row))
            header = True
        print("  ".join(f"{value!s:>{len(name)}}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
