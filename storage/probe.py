"""Every call that Weighbridge makes of a store, tried once: what the doctor asks.

Reading is tried on an object that is there, writing on scratch objects that are removed again. What a try raises is its
answer, and keeps no other from being tried; a store that is not there at all raises that.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import islice

from weighbridge.storage.errors import (
    BucketNotFound,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from weighbridge.storage.optional import OptionalCall
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import (
    Degrading,
    Move,
    ObjectInfo,
    OpenUploads,
    OpenWriter,
    Parts,
    PassedOver,
    Store,
)

SCRATCH = ".doctor-"
"""What names of scratch objects begin with."""
_OBJECTS, _TRIES = 1000, 5
"""Objects that are listed, and those that are tried until one can be read."""


class Call(StrEnum):
    """What is done with a store, in words that follow `can` and `cannot`."""

    LIST = "list objects"
    READ = "read ranges of an object that is pinned to its content"
    UPLOADS = "list unfinished multipart uploads"
    WRITERS = "see who has a file open for writing"
    WRITE = "write an object"
    ONCE = "write an object only if it is not there (If-None-Match)"
    PARTS = "write an object in parts"
    ABORT = "abort an upload in parts"
    RENAME = "copy or rename an object"
    DELETE = "delete an object"


@dataclass(frozen=True, slots=True)
class Tried:
    """How a call went, on `key`. With `instead`, the call is one that can be done without: `error` says why it is."""

    call: Call
    key: str
    error: StorageError | None = None
    instead: OptionalCall | None = None


def reading(store: Store, prefix: str) -> Iterator[Tried]:
    """Try what reads below a prefix, empty or ending in `/`. A part that cannot be listed is a LIST of its own."""
    found: list[ObjectInfo | PassedOver] = []
    listed = _try(store, Call.LIST, prefix, lambda: found.extend(islice(store.survey(prefix), _OBJECTS)))
    yield listed
    passed = (Tried(Call.LIST, one.key, one.error) for one in found if isinstance(one, PassedOver) and one.error)
    yield from islice(passed, _TRIES)
    keys = [info.key for info in found if isinstance(info, ObjectInfo) and info.size][:_TRIES]
    if listed.error is None:  # to keys that may not list, S3 says of what is not there that it is forbidden
        read = _first_read(store, keys, _scratch(prefix))
        yield read
        if isinstance(store, OpenWriter) and keys and read.error is None:
            yield _try(store, Call.WRITERS, read.key, lambda: store.has_writer(read.key))
    if isinstance(store, OpenUploads):
        yield _try(store, Call.UPLOADS, prefix, lambda: store.uploads(prefix))


def writing(store: Store, prefix: str) -> Iterator[Tried]:
    """Try what writes below a prefix, on objects whose names begin with `.doctor-`; nothing more where WRITE fails."""
    first, second, third = (_scratch(prefix) for _ in range(3))
    written = _try(store, Call.WRITE, first, lambda: store.put(first, b"weighbridge doctor"))
    yield written
    if written.error is None or written.instead is not None:
        yield from _rewriting(store, first, second, third)
    deleted = _try(store, Call.DELETE, first, lambda: _delete(store, first, second))
    if written.error is None or written.instead is not None:
        yield deleted


def _rewriting(store: Store, first: str, second: str, third: str) -> Iterator[Tried]:
    yield _try(store, Call.READ, first, lambda: _read(store, first))
    yield _try(store, Call.ONCE, first, lambda: _write_once(store, first))
    if isinstance(store, Parts):
        yield _try(store, Call.PARTS, second, lambda: store.put_in_parts(second, b"parts", if_none_match=True))
        yield _try(store, Call.ABORT, third, lambda: _abort(store, third))
    yield _try(store, Call.RENAME, second, lambda: _rename(store, first, second))


def _try(store: Store, call: Call, key: str, action: Callable[[], object]) -> Tried:
    before = _missing(store)
    try:
        action()
    except (BucketNotFound, StorageUnavailable):
        raise  # no other call would tell anything
    except StorageError as error:
        return Tried(call, key, error)
    lost = next((one for one in _missing(store) if one not in before), None)
    return Tried(call, key, lost.missing if lost else None, lost)


def _missing(store: Store) -> list[OptionalCall]:
    return [call for call in store.optional if call.missing is not None] if isinstance(store, Degrading) else []


def _scratch(prefix: str) -> str:
    """A name that no layout takes for a checkpoint, nor a listing of a folder's files for one of them."""
    return f"{prefix}{SCRATCH}{uuid.uuid4().hex}"


def _first_read(store: Store, keys: list[str], absent: str) -> Tried:
    """Read one that can be: another may be archived, or somebody else's. Without any, ask for what is not there."""
    tries = [_try(store, Call.READ, absent, lambda: _miss(store, absent))] if not keys else []
    for key in keys:
        tries.append(_try(store, Call.READ, key, partial(_read, store, key)))
        if tries[-1].error is None or tries[-1].instead is not None:
            return tries[-1]
    return tries[0]


def _read(store: Store, key: str) -> None:
    pinned = pin(store.head(key))
    for start in (0, min(1, pinned.size)):
        store.get(key, start=start, end=min(start + 1, pinned.size), if_match=pinned)


def _miss(store: Store, key: str) -> None:
    with suppress(ObjectNotFound):
        store.head(key)


def _write_once(store: Store, key: str) -> None:
    before = store.get(key)
    try:
        store.put(key, b"overwritten", if_none_match=True)
    except PreconditionFailed:
        if store.get(key) == before:
            return
    raise Overwritten(f"{key}: a conditional write (If-None-Match) overwrote an object", key=key)


class Overwritten(StorageError):
    """A store that takes no notice of a condition."""


def _abort(store: Parts, key: str) -> None:
    with store.unfinished(key):
        pass


def _rename(store: Store, source: str, key: str) -> None:
    if isinstance(store, Move):
        store.move(source, key)
    else:
        store.copy(pin(store.head(source)), key)


def _delete(store: Store, *keys: str) -> None:
    for key in keys:
        store.delete(key)
