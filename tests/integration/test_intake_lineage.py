"""What intake writes down beside a version: where it comes from, and who has to do something."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fixtures.checkpoints import safetensors
from fixtures.watched import Watched
from sqlmodel import select

from weighbridge import limits
from weighbridge.registry import lineage
from weighbridge.registry.api import views
from weighbridge.registry.db import Database
from weighbridge.registry.models import Checkpoint, Version
from weighbridge.storage import completeness
from weighbridge.storage.memory import MemoryStore
from weighbridge.storage.publish import publish
from weighbridge.storage.streaming import digest_bytes

ONE, TWO = safetensors(), safetensors({"w": ("F32", [2], bytes(8))})


@pytest.fixture
def watched(sqlite_url: str, opened: Callable[[str], Database]) -> Iterator[Watched]:
    """A store in memory, watched."""
    database = opened(sqlite_url)
    yield Watched(MemoryStore(), database)
    database.close()


def test_where_a_checkpoint_comes_from_is_kept_with_its_version(watched: Watched, tmp_path: Path) -> None:
    """The publisher's metadata and tags and the file's own words, in the version's transaction, each as its own."""
    file = safetensors(None, format="pt", status="ready", step="7")
    (tmp_path / "model.safetensors").write_bytes(file)
    publish(
        tmp_path,
        "digits",
        "run",
        store=watched.store,
        metadata={"commit": "1f3a", "status": "best"},
        tags={"owner": "ann"},
    )
    watched.tell("digits/run/weighbridge.json").settle()
    [version] = watched.versions()
    with watched.db.read() as tx:
        assert lineage.of(tx, version.id or 0, lineage.PUBLISHER) == {"commit": "1f3a", "status": "best"}
        assert lineage.of(tx, version.id or 0, lineage.FILES) == {"format": "pt", "status": "ready", "step": "7"}
        shown = views.version_detail(tx, tx.get_one(Version, version.id))
    assert (shown.status, shown.tags) == ("discovered", {"owner": "ann"})
    assert (shown.metadata["status"], shown.file_metadata["status"]) == ("best", "ready")
    [tagged] = watched.events("tag.set")
    assert (tagged.actor, tagged.version) == ("publisher", 1)


def test_a_file_dropped_by_hand_says_what_it_says(watched: Watched) -> None:
    """Without a publisher; too much of it is cut, and the version is recorded all the same, once."""
    watched.drop(("digits/a.safetensors", safetensors(None, note="x" * 100_000, nul="\0", **{"": "no name"})))
    watched.list()
    watched.settle()
    [version] = watched.versions()
    with watched.db.read() as tx:
        said = lineage.of(tx, version.id or 0, lineage.FILES)
    assert said["nul"] == "\ufffd"
    assert len(said["note"]) == limits.METADATA_VALUE
    assert said.keys() == {"note", "nul"}


def test_a_forged_manifest_cannot_keep_its_checkpoint_from_being_recorded(watched: Watched) -> None:
    """Tags and notes of any number and length, by whoever can write to the bucket."""
    watched.drop(("digits/run/model.safetensors", ONE))
    said = {f"k{number}": "x" * 10_000 for number in range(200)} | {"": "x", " ": "y", "n" * 1000: "z"}
    files = [{"path": "model.safetensors", "size": len(ONE), "digest": digest_bytes(ONE)}]
    manifest = {"format": "weighbridge.checkpoint/1", "files": files, "metadata": said, "tags": said}
    watched.drop(
        ("digits/other/model.safetensors", ONE), ("digits/other/weighbridge.json", json.dumps(manifest).encode())
    )
    [version] = [one for one in watched.versions() if one.path == "digits/other/"]
    with watched.db.read() as tx:
        shown = views.version_detail(tx, tx.get_one(Version, version.id))
    assert 0 < len(shown.tags) <= limits.METADATA
    assert sum(map(len, shown.metadata.values())) <= limits.METADATA_TEXT


@pytest.mark.parametrize(
    ("files", "person"),
    [
        ({"digits/recipe.yaml": b"gates: 7", "digits/a.safetensors": ONE}, True),
        ({"digits/eval.safetensors": b"\x80\x04" + bytes(20), "digits/a.safetensors": ONE}, True),
        ({"digits/eval.safetensors": ONE[:-1], "digits/a.safetensors": ONE}, False),
        ({"digits/a.safetensors": ONE[:-1]}, False),
        ({"digits/a/1.safetensors": ONE, "digits/a/2.safetensors": TWO}, False),
    ],
)
def test_what_waits_for_a_person_is_told_from_what_is_still_written(
    files: dict[str, bytes], person: bool, watched: Watched
) -> None:
    """An invalid recipe or set does not become valid by waiting; a short file, or a missing index, may."""
    watched.drop(*files.items())
    with watched.db.read() as tx:
        [row] = tx.scalars(select(Checkpoint)).all()
    assert (row.state, row.needs_person) == ("waiting", person)


def test_several_files_that_nobody_writes_to_any_more_wait_for_a_person(watched: Watched) -> None:
    """An index is put last, right after them: a minute later it is not coming by itself."""
    objects = [("digits/a/1.safetensors", ONE), ("digits/a/2.safetensors", TWO)]
    watched.drop(*objects)
    later = datetime.now(UTC) + timedelta(minutes=2)
    verdict = completeness.look(watched.store, "digits/a/", now=later)
    assert isinstance(verdict, completeness.Waiting)
    assert verdict.needs_person
