"""Random histories of a watched store: the versions that may be served are exactly the distinct weights."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fixtures.histories import CONTENTS, DIGESTS, PATHS, History
from fixtures.registry import SqliteFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weighbridge.registry.db import Database
from weighbridge.registry.lifecycle import VersionStatus
from weighbridge.storage.folder import FolderStore
from weighbridge.storage.memory import MemoryStore

DOINGS = (
    *("write", "write", "rewrite", "companion", "drop_companion", "delete", "copy", "move", "away_and_back"),
    *("touch", "chmod", "keep_date"),
)
WHOLE = ("observe", "observe", "restart")
HALF = ("look", "hear", "judge", "restart")

Doing = tuple[str, str, int]


def doings(*names: str) -> st.SearchStrategy[list[Doing]]:
    one = st.tuples(st.sampled_from(names), st.sampled_from(PATHS), st.integers(0, len(CONTENTS) - 1))
    return st.lists(one, max_size=25)


Tell = Callable[[], contextlib.AbstractContextManager[History]]


@pytest.fixture
def tell(
    sqlite_file: SqliteFile, quick_folder: Path, opened: Callable[[str], Database], request: pytest.FixtureRequest
) -> Tell:
    """Begins a history: a store of the kind that is asked for, and a database, both fresh."""
    db = opened(sqlite_file.url)

    @contextlib.contextmanager
    def begin() -> Iterator[History]:
        sqlite_file.renew()
        drops = Path(tempfile.mkdtemp(dir=quick_folder))
        try:
            yield History(FolderStore(drops, durable=False) if request.param == "folder" else MemoryStore(), db)
        finally:
            db.close()
            shutil.rmtree(drops)

    return begin


def served_exactly(tell: Tell, steps: list[Doing]) -> None:
    """Every time that it is looked: what may be served is what was there to be seen, once each, as it was written."""
    with tell() as told:
        for what, path, content in [*steps, ("observe", "", 0)]:
            getattr(told, what)(path, min(content, len(CONTENTS) - 1))
            if what == "observe":
                assert told.ready() == told.served
                assert len(told.watched.versions()) == told.rows, "a path whose weights did not change makes nothing"
        statuses = {version.status for version in told.watched.versions()}
        assert statuses <= {VersionStatus.READY, VersionStatus.DUPLICATE}
        before = [version.number for version in told.watched.versions()]
        told.restart()
        waiting = sum(state != "complete" for state, _ in told.watched.states().values())
        assert told.watched.list() == waiting, "what is known is not looked at again"
        told.observe()
        assert [version.number for version in told.watched.versions()] == before


def served_once(tell: Tell, steps: list[Doing]) -> None:
    """However looks, judgements and changes mix: in the end all that lies there is servable, and nothing is twice."""
    with tell() as told:
        for what, path, content in steps:
            getattr(told, what)(path, content)
        told.observe()
        ready = told.ready()
        assert len(ready) == len(set(ready))
        assert {told.content(path) for path in PATHS if told.there(path)} <= set(ready)
        ended = {VersionStatus.READY, VersionStatus.DUPLICATE, VersionStatus.SUPERSEDED}
        assert {version.status for version in told.watched.versions()} <= ended
        for version in told.watched.versions():
            if version.status == VersionStatus.DUPLICATE:
                assert DIGESTS[version.facts["weights"]] in ready
        if ready:
            assert told.latest().status != VersionStatus.DUPLICATE


PROPERTIES: list[tuple[Callable[[Tell, list[Doing]], None], tuple[str, ...]]] = [
    (served_exactly, DOINGS + WHOLE),
    (served_once, DOINGS + HALF),
]
_QUICK = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("tell", ["memory", "folder"], indirect=True)
@pytest.mark.parametrize(("holds", "names"), PROPERTIES, ids=lambda one: getattr(one, "__name__", ""))
def test_versions_are_the_distinct_weights(
    tell: Tell, holds: Callable[[Tell, list[Doing]], None], names: tuple[str, ...]
) -> None:
    """A few histories for every day."""
    _QUICK(given(doings(*names))(lambda steps: holds(tell, steps)))()


@pytest.mark.slow
@pytest.mark.parametrize("tell", ["memory", "folder"], indirect=True)
@pytest.mark.parametrize(("holds", "names"), PROPERTIES, ids=lambda one: getattr(one, "__name__", ""))
def test_versions_are_the_distinct_weights_in_a_thousand_histories(
    tell: Tell, holds: Callable[[Tell, list[Doing]], None], names: tuple[str, ...]
) -> None:
    """The same, a thousand in all."""
    _MANY(given(doings(*names))(lambda steps: holds(tell, steps)))()


_MANY = settings(_QUICK, max_examples=250)
