"""What is said of a version by its publisher and its files, kept beside what is known of it. Nothing decides by it."""

from __future__ import annotations

from typing import Final

from sqlalchemy import insert, select
from sqlmodel import col

from weighbridge.registry import tags
from weighbridge.registry.db import Session
from weighbridge.registry.models import Said, Version
from weighbridge.storage.lineage import Lineage

PUBLISHER: Final = "publisher"
FILES: Final = "files"


def keep(tx: Session, model: str, version: Version, said: Lineage) -> None:
    """Write down what is said of a version that was just recorded, and its publisher's tags, in its transaction.

    Tags that people set later replace these, and nothing that is published afterwards replaces theirs.
    """
    rows = [
        {"version_id": version.id, "source": source, "name": name, "value": value}
        for source, entries in ((PUBLISHER, said.publisher), (FILES, said.files))
        for name, value in entries.items()
    ]
    if rows:
        tx.execute(insert(Said), rows)
    for key, value in said.tags.items():
        tags.set_tag(tx, model, version.number, key, value, actor=PUBLISHER)


def of(tx: Session, version_id: int, source: str) -> dict[str, str]:
    """What a source says of a version, by name."""
    mine = select(col(Said.name), col(Said.value)).where(col(Said.version_id) == version_id, col(Said.source) == source)
    return {row[0]: row[1] for row in tx.execute(mine.order_by(col(Said.name)))}
