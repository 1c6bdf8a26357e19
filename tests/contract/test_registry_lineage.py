"""What is said of a version, on each database."""

from __future__ import annotations

from fixtures.registry import record

from weighbridge.registry import events, lineage, tags
from weighbridge.registry.api import views
from weighbridge.registry.db import Database
from weighbridge.registry.models import Version
from weighbridge.storage.lineage import Lineage, bounded

HOSTILE = {"a\0": "\ud800", "n" * 10_000: "x" * 1_000_000, "ü" * 255: "\n\x1b[31m", "k": "x" * 1_000_000}


def test_strangers_words_fit_every_database(database: Database) -> None:
    """NUL, half characters, a megabyte: kept as text, cut, and each under its source."""
    said = bounded(HOSTILE)
    with database.transaction() as tx:
        recorded = record(tx, "a")
        lineage.keep(tx, "digits", recorded.version, Lineage(said, said, said))
        version_id = recorded.version.id
    with database.read() as tx:
        shown = views.version_detail(tx, tx.get_one(Version, version_id))
    assert shown.metadata == shown.file_metadata == said
    assert shown.tags == said
    assert len(said) == len(HOSTILE)


def test_a_persons_tag_replaces_a_publishers(database: Database) -> None:
    """And is never replaced by what is published afterwards, which is another version."""
    with database.transaction() as tx:
        first = record(tx, "a").version
        lineage.keep(tx, "digits", first, Lineage(tags={"owner": "anybody"}))
        tags.set_tag(tx, "digits", 1, "owner", "ann", actor="ann")
        lineage.keep(tx, "digits", record(tx, "b").version, Lineage(tags={"owner": "anybody"}))
        shown = views.version_list(tx, [first])
    assert shown[0].tags == {"owner": "ann"}
    events.sequence(database, "test")
    with database.read() as tx:
        told = [(event.version, event.actor) for event in events.read(tx, 0, 100, None, ["tag.set"])]
    assert told == [(1, "publisher"), (1, "ann"), (2, "publisher")]
