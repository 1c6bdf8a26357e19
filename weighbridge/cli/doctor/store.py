"""The stores: can every call be made that daemon, workers, registry and publishers make, and has the disk space.

Which calls those are is a table (`roles`), how they are tried is `storage.probe`; here the answers become findings.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from weighbridge.cli import output
from weighbridge.cli.doctor import roles
from weighbridge.cli.doctor.advice import advice
from weighbridge.cli.doctor.finding import Finding
from weighbridge.cli.doctor.roles import Place, Role
from weighbridge.cli.session import Session
from weighbridge.storage import probe
from weighbridge.storage.errors import AccessDenied, NotSupported, StorageError
from weighbridge.storage.probe import Call, Tried
from weighbridge.storage.protocols import LocalPath
from weighbridge.storage.settings import MOVE

if TYPE_CHECKING:
    from pathlib import Path

    from weighbridge.storage.protocols import Store

PART = "storage"
LEAST_FREE = 1 << 30
"""Bytes. Below this a large checkpoint will not fit."""
_CONDITIONS = "use a store with conditional writes (AWS, MinIO, SeaweedFS, Ceph, R2), or upgrade it"


def check(run: Session, only: Collection[Role] = ()) -> Iterator[Finding]:
    """Try what the roles need (all roles, when none is named) in the watched store and in that of the artifacts."""
    settings = run.settings.storage
    asked = frozenset(only or Role)
    source, watched = settings.open_source(), _folder(settings.prefix)
    if roles.of(Place.WATCHED, Call.LIST, asked):
        yield from _models(source, watched)
    required = frozenset(only or roles.SERVICES)
    yield from tried(source, watched, Place.WATCHED, asked, required)
    yield from tried(settings.open_artifacts(), _folder(settings.artifacts_prefix), Place.ARTIFACTS, asked, required)
    if settings.exposed:
        yield Finding(PART, True, settings.exposed, MOVE, warns=True)
    yield from space(run.settings.data, source)


def tried(
    store: Store, prefix: str, place: Place, asked: Collection[Role], required: Collection[Role]
) -> Iterator[Finding]:
    """What one can do there with these keys, and each thing that one cannot, of what the roles `asked` about do.

    What none of the `required` roles needs is told, and is nothing wrong.
    """
    tries = list(probe.reading(store, prefix))
    if roles.of(place, Call.WRITE, asked):
        tries += probe.writing(store, prefix)
    needed = [(one, roles.of(place, one.call, asked)) for one in tries]
    if good := dict.fromkeys(_words(one) for one, need in needed if need and one.error is None):
        where = f"{store.url}: {prefix}" if prefix else store.url
        yield Finding(PART, True, f"{where} ({place}): {'; '.join(good)}")
    for one, need in needed:
        if need and one.error is not None:
            yield _lacks(store, one, one.error, need, bool(set(need).intersection(required)))


def _words(one: Tried) -> str:
    if one.call is Call.ONCE:
        return "a conditional write (If-None-Match) is refused when the key is there"
    if one.call is Call.READ and not one.key.rpartition("/")[2].startswith(probe.SCRATCH):
        return f"{one.key} can be read"
    return f"one can {one.call}"


def _lacks(store: Store, one: Tried, error: StorageError, need: Sequence[Role], required: bool) -> Finding:
    """What is missing, who needs it, and what to do about it."""
    what = f"{store.url}: cannot {one.call}: {error}"
    permission = error.permission if isinstance(error, AccessDenied) else None
    done = f"; until then {one.instead.without}" if one.instead else ""
    unknown = one.instead is not None and isinstance(error, NotSupported)
    if one.call is Call.ONCE and not isinstance(error, AccessDenied):
        fix, ok = _CONDITIONS, False
    elif not required:
        fix, ok = f"{_cure(store, one, error)} if publishers do as these settings say; else nothing is wrong", True
    elif unknown:
        fix, ok = f"nothing: {one.instead.without if one.instead else ''}", True
    else:
        fix, ok = f"{_cure(store, one, error)}{done}", False
    return Finding(PART, ok, what, f"{fix} (needed by {roles.words(need)})", permission, tuple(need))


def _cure(store: Store, one: Tried, error: StorageError) -> str:
    if not isinstance(error, AccessDenied):
        return advice(error) or "see what the store says"
    if isinstance(store, LocalPath):
        return f"let user {os.geteuid()} {roles.FOLDER_RIGHTS[one.call]} in {_place(store, one.key)}"
    return f"allow {error.permission}" if error.permission else advice(error)


def _place(store: LocalPath, key: str) -> Path:
    """The folder that a right is missing for: the key itself, or what holds it, as far as it is there."""
    try:
        path = store.local_path(key.removesuffix("/") or "x")
    except StorageError:  # what cannot be a key is shown, not named
        path = store.local_path("x")
    below = path if key.endswith("/") else path.parent
    return next(folder for folder in (below, *below.parents) if folder.is_dir())


def _models(store: Store, prefix: str) -> Iterator[Finding]:
    """How many there are. Where a right is missing to list them, that is found among the others."""
    try:
        names = [entry.key[len(prefix) :] for entry in store.entries(prefix) if entry.info is None]
    except AccessDenied as error:
        if error.permission is None and not isinstance(store, LocalPath):
            raise
        return
    models = sum(not name.startswith(".") for name in names)
    yield Finding(PART, True, f"{store.url} can be listed; folders of models: {models}")


def _folder(prefix: str) -> str:
    return f"{prefix.strip('/')}/" if prefix.strip("/") else ""


def space(data: Path, store: Store) -> Iterator[Finding]:
    """Free bytes where local files are written."""
    places = {data.absolute()} | ({store.local_path("x").parent} if isinstance(store, LocalPath) else set())
    for place in sorted(places):
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        fix = "" if free >= LEAST_FREE else "free some space: nothing is lost, but new checkpoints wait"
        yield Finding(PART, free >= LEAST_FREE, f"{place} has {output.size(free)} free", fix)
