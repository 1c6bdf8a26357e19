"""Random histories of uploads, overwrites, events and listings end in exactly the right versions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fixtures.checkpoints import safetensors, sharded
from fixtures.registry import SqliteFile
from fixtures.watched import Watched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weighbridge.registry.db import Database
from weighbridge.registry.models import CheckpointFile
from weighbridge.storage.events import Kind
from weighbridge.storage.memory import MemoryStore

SINGLES = [safetensors({"w": ("F32", [size], bytes(4 * size))}) for size in (1, 2)]
FOLDERS = [sharded(2, seed) for seed in (0, 7)]
STEPS = ("single", "cut", "shard", "cut shard", "delete", "event", "false event", "list", "wait")


@dataclass
class History:
    """The store's writer on one side, the daemons on the other, and what must come of it."""

    watched: list[Watched]
    store: MemoryStore
    written: set[str] = field(default_factory=set)

    def step(self, what: str, pick: int) -> None:
        first = self.watched[pick % len(self.watched)]
        single = f"m/{pick % 2}.safetensors"
        files = FOLDERS[pick // 2 % 2]
        shard = f"m/run/{sorted(files)[pick % len(files)]}"
        match what:
            case "single":
                self.put(single, SINGLES[pick // 2 % 2])
            case "cut":
                self.put(single, SINGLES[pick // 2 % 2][:-3])
            case "shard":
                self.put(shard, files[shard.rpartition("/")[2]])
            case "cut shard":
                self.put(shard, files[shard.rpartition("/")[2]][:-3])
            case "delete":
                self.store.delete((single, shard)[pick // 2 % 2])
            case "event":
                first.tell(single, shard)
            case "false event":
                first.tell(single, shard, "m/recipe.yaml", "m/nothing/here", kind=Kind.REMOVED)
            case "list":
                first.list()
            case "wait":
                first.settle(pick / 10)

    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)
        self.written.add(key)

    def finish(self) -> None:
        """Everything is put whole at last; nobody tells, the listings of all daemons find it."""
        for number in range(2):
            self.put(f"m/{number}.safetensors", SINGLES[number])
        for name, data in FOLDERS[0].items():
            self.put(f"m/run/{name}", data)
        for watched in self.watched:
            watched.list()
            watched.settle(40)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 15)), max_size=30))
def test_any_history_ends_in_exactly_the_right_versions(
    sqlite_file: SqliteFile, opened: Callable[[str], Database], steps: list[tuple[str, int]]
) -> None:
    """The last content of each checkpoint is one version, every version is of one whole content, and none is twice."""
    db = opened(sqlite_file.renew().url)
    try:
        store = MemoryStore()
        history = History([Watched(store, db), Watched(store, db)], store)
        for what, pick in steps:
            history.step(what, pick)
        history.finish()
        check(history)
    finally:
        db.close()


def check(history: History) -> None:
    store, watched = history.store, history.watched[0]
    versions = watched.versions()
    assert len({version.pins_digest for version in versions}) == len(versions), "none is twice"
    assert [version.number for version in versions] == list(range(1, len(versions) + 1))
    there = {info.key: info.etag for info in store.list("m/") if info.key in history.written}
    sizes, latest = {len(data) for data in SINGLES}, {}
    with watched.db.read() as tx:
        for version in versions:
            files = tx.query(CheckpointFile).filter_by(version_id=version.id).all()
            latest[version.path] = {file.key: file.etag for file in files}
            if version.path.endswith(".safetensors"):
                assert files[0].size in sizes, "no version is of a half"
    assert {key: etag for files in latest.values() for key, etag in files.items()} == there, (
        "the last version of each path is what lies there now, whenever it was put"
    )
    assert {state for state, _ in watched.states().values()} == {"complete"}
