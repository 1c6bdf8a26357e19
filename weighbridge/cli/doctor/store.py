"""The store: can it be listed, read and written, does it keep its promise of conditional writes, has it space."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weighbridge.cli import output
from weighbridge.cli.doctor.finding import Finding
from weighbridge.cli.session import Session

if TYPE_CHECKING:
    from pathlib import Path

    from weighbridge.storage.protocols import Store

PART = "storage"
LEAST_FREE = 1 << 30
"""Bytes. Below this a large checkpoint will not fit."""


def check(run: Session) -> Iterator[Finding]:
    """List and read the watched store, write and delete below the artifacts' prefix."""
    settings = run.settings.storage
    source = settings.open_source()
    entries = list(source.entries(f"{settings.prefix.strip('/')}/" if settings.prefix.strip("/") else ""))
    models = sorted(entry.key for entry in entries if entry.info is None and not entry.key.startswith("."))
    yield Finding(PART, True, f"{source.url} can be listed; folders of models: {len(models)}")
    for entry in entries:
        if entry.info is not None:
            source.get(entry.key, end=min(1, entry.info.size))
            yield Finding(PART, True, f"{entry.key} can be read")
            break
    yield from writes(settings.open_artifacts(), settings.artifacts_prefix.strip("/"))
    yield from space(run.settings.data, source)


def writes(store: Store, prefix: str) -> Iterator[Finding]:
    """A new key can be written once, and only once, and be read and deleted."""
    from weighbridge.storage.errors import PreconditionFailed

    key = f"{prefix}/doctor-{uuid.uuid4().hex}".lstrip("/")
    store.put(key, b"first", if_none_match=True)
    try:
        try:
            store.put(key, b"second", if_none_match=True)
            kept = False
        except PreconditionFailed:
            kept = store.get(key) == b"first"
    finally:
        store.delete(key)
    yield Finding(PART, True, f"{store.url}: {prefix}/ can be written, read and deleted")
    yield Finding(
        PART,
        kept,
        "a conditional write (If-None-Match) "
        + ("is refused when the key is there" if kept else "overwrote an object"),
        "" if kept else "use a store with conditional writes (AWS, MinIO, SeaweedFS, Ceph, R2), or upgrade it",
    )


def space(data: Path, store: Store) -> Iterator[Finding]:
    """Free bytes where local files are written."""
    from weighbridge.storage.protocols import LocalPath

    places = {data.absolute()} | ({store.local_path("x").parent} if isinstance(store, LocalPath) else set())
    for place in sorted(places):
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        fix = "" if free >= LEAST_FREE else "free some space: nothing is lost, but new checkpoints wait"
        yield Finding(PART, free >= LEAST_FREE, f"{place} has {output.size(free)} free", fix)
