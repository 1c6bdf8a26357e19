"""Is this set of objects a whole checkpoint? Decided by proof, from a listing and a few ranged reads.

The rule behind every answer: one file that is wrong *by itself* can only be refused; files that are short, missing or
do not fit *each other* may still be written, so they wait, with the reason.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from typing import Protocol

from weighbridge.storage import names
from weighbridge.storage.claims import is_claim
from weighbridge.storage.errors import ObjectNotFound, PreconditionFailed
from weighbridge.storage.index import Index, MalformedIndex, read_index
from weighbridge.storage.lineage import Lineage, bounded, of_files
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import (
    Get,
    List,
    LocalPath,
    ObjectInfo,
    OpenUploads,
    OpenWriter,
    PassedOver,
    Ref,
    Survey,
)
from weighbridge.storage.published import MalformedManifest, PublishedFile, read_published
from weighbridge.storage.safetensors_header import (
    MAX_TENSORS,
    Header,
    MalformedHeader,
    ShortFile,
    read_start,
)
from weighbridge.words import counted

QUIET = 30.0
"""Seconds without a change that must do where nobody can tell whether a file has a writer."""
_RESTS = 60.0
"""Seconds without a change after which nobody is taken to be writing any more."""
MAX_OBJECTS = 10_000
"""Objects of one checkpoint; the largest real ones have a few hundred."""
LARGE = 1 << 20
"""Bytes of a header or an index that is looked at while no other large one is: memory is bounded by one of them."""
_NEIGHBOURS = 1000
"""Objects with the same start that are searched for marks."""

_ONE_LARGE = threading.RLock()


class Proof(StrEnum):
    """Why a checkpoint is believed complete, the best first."""

    P0 = "P0"
    """Our manifest, put last by `publish`."""
    P1 = "P1"
    """The format's own marker, and structure."""
    P2 = "P2"
    """Structure: every file is as long as it says, and they fit each other."""
    P3 = "P3"
    """Only a quiet period: unproven, never rolled out by itself."""


@dataclass(frozen=True, slots=True)
class Complete:
    """A whole checkpoint. `files` are its pins, sorted by key; `reason` says what was proven."""

    proof: Proof
    files: tuple[Ref, ...]
    reason: str
    lineage: Lineage = field(default_factory=Lineage)
    """What its publisher and its files say of it."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not whole yet, and more bytes may make it so; `reason` says what is missing.

    `needs_person`: nobody writes to it any more, as far as dates tell, so that somebody has to add or change something.
    """

    reason: str
    needs_person: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """Wrong by content: no further byte makes it a checkpoint."""

    reason: str
    files: tuple[Ref, ...]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Weights in a format that cannot be weighed yet; nothing is lost, and the reason says what to do."""

    reason: str
    files: tuple[Ref, ...]


Verdict = Complete | Waiting | Refused | Unsupported


class Look(Get, List, Survey, Protocol):
    """The verbs that a look needs; OpenWriter, OpenUploads and LocalPath are used where the store has them."""


def look(store: Look, path: str, *, now: datetime | None = None) -> Verdict:
    """List `path` (an object's key, or a folder's ending in `/`) and assess what is there."""
    return assess(store, listed(store, path), path=path, now=now)


def surveyed(store: Survey, path: str) -> list[ObjectInfo | PassedOver]:
    """What lies at a path: all under a folder (one more than MAX_OBJECTS at most), or the one object of that key."""
    if path.endswith("/"):
        return list(islice(store.survey(path), MAX_OBJECTS + 1))
    found = store.find(path)
    return [] if found is None else [found]


def listed(store: Survey, path: str) -> list[ObjectInfo]:
    """The objects of one checkpoint, without what was passed over."""
    return [one for one in surveyed(store, path) if isinstance(one, ObjectInfo)]


def assess(store: Look, objects: Sequence[ObjectInfo], *, path: str, now: datetime | None = None) -> Verdict:
    """Decide about the `objects` at `path`, all of one checkpoint; `now` judges quiet where writers cannot be seen.

    Raises StorageUnavailable and the like when the store does not answer: then nothing is decided.
    """
    try:
        with ExitStack() as held:
            verdict = _Assessment(store, path, objects, now or datetime.now(UTC), held).verdict()
    except _Wait as wait:
        return Waiting(str(wait), wait.needs_person)
    except (ObjectNotFound, PreconditionFailed):
        return Waiting(f"{path} changed while it was looked at")
    if isinstance(verdict, Waiting):
        return verdict
    # Listed again: pins are of what is there now, and of nothing that changed meanwhile.
    after = {pin(info).key: info for info in listed(store, path)}
    before = {info.key: info for info in objects}
    if any(ref.key not in after or _identity(after[ref.key]) != _identity(before[ref.key]) for ref in verdict.files):
        return Waiting(f"{path} changed while it was looked at")
    if after.keys() != before.keys() and getattr(verdict, "proof", None) is not Proof.P0:
        return Waiting(f"{path} changed while it was looked at")
    return verdict


class _Wait(Exception):
    """The verdict Waiting, from wherever it is found."""

    def __init__(self, reason: str, needs_person: bool = False) -> None:
        super().__init__(reason)
        self.needs_person = needs_person


class _Assessment:
    """One look at one checkpoint. Each step returns or raises _Wait."""

    def __init__(self, store: Look, path: str, objects: Sequence[ObjectInfo], now: datetime, held: ExitStack) -> None:
        self._store, self._path, self._now, self._held = store, path, now, held
        self._tensors = 0
        self._objects = {info.key: info for info in objects}
        self._root = path if path.endswith("/") else path.rpartition("/")[0] + "/" * ("/" in path)
        self._uploads = self._open_uploads()

    def verdict(self) -> Verdict:
        if not self._objects:
            raise _Wait(f"there is nothing at {self._path} yet")
        try:
            if self._path.endswith("/") and self._root + names.PUBLISHED in self._objects:
                return self._published()
            return self._structural()
        except (MalformedHeader, MalformedIndex, MalformedManifest) as wrong:
            return Refused(str(wrong), self._pins(self._objects))

    def _published(self) -> Verdict:
        """P0: every file that the manifest names is there, at its size, written to its end."""
        manifest = self._root + names.PUBLISHED
        self._prove_written([manifest])
        try:
            published = read_published(self._store, pin(self._objects[manifest]))
        except MalformedManifest as error:
            if error.truncated:
                raise _Wait(str(error)) from error
            raise
        for file in published.files:
            self._prove_size(file)
        keys = [self._root + file.path for file in published.files]
        self._prove_written(keys)
        headers = {key: self._header(key) for key in filter(names.is_weights, keys)}
        ignored = [key for key in self._objects.keys() - {*keys, manifest} if not is_claim(key[len(self._root) :])]
        more = f"; left out, since it does not name them: {len(ignored)}" if ignored else ""
        count = counted(len(keys), "file")
        reason = f"{names.PUBLISHED} names {count}, all there{more}"
        said = Lineage(bounded(published.metadata), self._said(headers), bounded(published.tags))
        return Complete(Proof.P0, self._pins([*keys, manifest]), reason, said)

    def _structural(self) -> Verdict:
        """P2: by the headers, and by the index that binds shards together."""
        self._prove_no_marks()
        keys = [key for key in self._objects if not names.is_hidden(key[len(self._root) :])]
        weights = [key for key in keys if names.is_weights(key)]
        indexes = [key for key in keys if key.endswith(names.INDEX)]
        if (foreign := self._foreign(keys, weights)) is not None:
            return Unsupported(foreign, self._pins(keys))
        if not weights and not indexes:
            return self._without_safetensors()
        self._prove_written(keys)
        headers = {key: self._header(key) for key in weights}
        extra = [key for key in keys if key.endswith(names.SAFETENSORS) and key not in headers]
        for key in extra:
            self._header(key)
        shards: set[str] = set()
        notes = []
        for key in indexes:
            found, note = self._prove_index(key, headers)
            shards |= found
            notes.append(note)
        self._prove_no_strays(sorted(headers.keys() - shards), bool(indexes))
        tensors = sum(len(header.tensors) for header in headers.values())
        files = counted(len(headers), "safetensors file")
        bound = ", exactly those of the index" if indexes else ""
        reason = f"{files} with {counted(tensors, 'tensor')}, as long as the headers say{bound}{''.join(notes)}"
        return Complete(Proof.P2, self._pins(keys), reason, Lineage(files=self._said(headers)))

    def _said(self, headers: Mapping[str, Header]) -> dict[str, str]:
        return of_files((key[len(self._root) :], headers[key].metadata) for key in sorted(headers))

    def _without_safetensors(self) -> Verdict:
        foreign = sorted(key for key in self._objects if names.is_other_weights(key))
        if not foreign and self._path.endswith("/"):
            below = (key.rpartition("/")[2] for key in sorted(self._objects))
            odd = next((f"; is {name} meant to be {meant}?" for name in below if (meant := names.meant(name))), "")
            raise _Wait(f"{self._path} has no {names.SAFETENSORS} file yet, only {len(self._objects)} other files{odd}")
        key = foreign[0] if foreign else self._path
        kind = names.suffix(key.rpartition("/")[2]) or "without a suffix"
        reason = f"{key}: format {kind} is not supported yet: publish safetensors"
        return Unsupported(reason, self._pins(self._objects))

    def _foreign(self, keys: Sequence[str], weights: Sequence[str]) -> str | None:
        """Why these files are no single model's weights, and what to do; None where nothing says so."""
        below = {key: key[len(self._root) :] for key in keys}
        if pipeline := next((key for key, name in below.items() if name.endswith("model_index.json")), None):
            return f"{pipeline} is of a diffusers pipeline of several models: drop each part as a model of its own"
        if weights and all(map(names.is_adapter, weights)):
            return f"{weights[0]} is an adapter, no model: drop what merging it into its base gives (merge_and_unload)"
        steps = (below[key].split("/")[:-1] for key in weights)
        if deep := next((parts[0] for parts in steps if parts and names.is_step(parts[0])), None):
            return (
                f"{self._path} is a trainer's output folder: {deep} in it is a checkpoint of its own, one level too "
                f"deep: move it up, beside {self._path}, or make {self._path} the model's folder"
            )
        return None

    def _prove_no_marks(self) -> None:
        """No name, no sibling and no open upload says that somebody is still writing."""
        if uploads := [key for key in self._uploads if self._path.endswith("/") or key == self._path]:
            raise _Wait(f"a multipart upload of {min(uploads)} is not finished: complete or abort it")
        below = {key[len(self._root) :]: key for key in self._objects}
        if marked := sorted(key for name, key in below.items() if names.is_unfinished(name)):
            raise _Wait(f"{marked[0]} is marked unfinished by its name")
        for name, key in below.items():
            ends = (end for end in names.BESIDE if name.lower().endswith(end))
            if other := next((name[: -len(end)] for end in ends if name[: -len(end)] in below), None):
                raise _Wait(f"{key} beside it says that {below[other]} is unfinished")
        if marker := self._marker():
            raise _Wait(f"the marker {marker} says that it is unfinished")

    def _marker(self) -> str | None:
        """The object beside the path whose whole name marks it; one of its folder counts as its first."""
        path = self._path.removesuffix("/")
        parent, slash, name = path.rpartition("/")
        if isinstance(self._store, LocalPath):
            # By name: listing a folder on disk means reading all of it, and it may hold a million files.
            folder = str(self._store.local_path(path).parent)
            there = (other for other in names.marking(name) if os.path.lexists(f"{folder}/{other}"))
            return next((parent + slash + other for other in there), None)
        starts = f"{path}." if self._path.endswith("/") else path, f"{path.removesuffix(names.SAFETENSORS)}-unfinished"
        for start in starts:
            for info in islice(self._store.list(start), _NEIGHBOURS):
                if names.marks(name, info.key[len(parent + slash) :].partition("/")[0]):
                    return info.key
        return None

    def _prove_written(self, keys: Iterable[str]) -> None:
        """No open upload, no empty file, no open writer; where writers cannot be seen, a quiet period."""
        for key in sorted(keys):
            info = self._objects[key]
            if key in self._uploads:
                raise _Wait(f"a multipart upload of {key} is not finished: complete or abort it")
            if not isinstance(self._store, OpenWriter):
                continue
            writer = self._store.has_writer(key)
            if writer:
                raise _Wait(f"{key} is still open for writing")
            age = (self._now - info.modified).total_seconds()
            if writer is None and age < QUIET:
                raise _Wait(f"{key} changed {age:.0f} s ago; writers cannot be seen here: {QUIET:.0f} s must be quiet")

    def _prove_size(self, file: PublishedFile) -> None:
        info = self._objects.get(self._root + file.path)
        if info is None:
            raise _Wait(f"{names.PUBLISHED} names {file.path}, which is not there yet")
        if info.size != file.size:
            raise _Wait(f"{file.path} has {info.size:,} of {file.size:,} bytes by {names.PUBLISHED}")

    def _prove_index(self, key: str, headers: Mapping[str, Header]) -> tuple[set[str], str]:
        """The index names exactly the tensors of its shards. Returns the shards' keys, and what is odd about it."""
        index = self._index(key)
        folder = key.rpartition("/")[0] + "/" * ("/" in key)
        shards = {folder + name for name in index.shards}
        if missing := sorted(shards - headers.keys()):
            raise _Wait(f"{key} names {missing[0]}, which is not there yet")
        held = {name: shard for shard in sorted(shards) for name in headers[shard].tensors}
        named = {name: folder + shard for name, shard in index.weight_map.items()}
        if held != named:
            odd = min(name for name in held.keys() | named.keys() if held.get(name) != named.get(name))
            raise _Wait(f"{key} says that {odd!r} is in {named.get(odd)}, the headers say {held.get(odd)}")
        if sum(len(headers[shard].tensors) for shard in shards) != len(held):
            raise _Wait(f"{key}: some tensor is in two of its files")
        total = sum(headers[shard].data_size for shard in shards)
        if index.total_size is None or index.total_size == total:
            return shards, ""
        # Nobody reads it: tools write counts or the files' sizes there.
        return shards, f"; its total_size says {index.total_size:,} bytes, the tensors have {total:,}"

    def _index(self, key: str) -> Index:
        info = self._objects[key]
        if info.size > LARGE:
            self._alone()
        try:
            return read_index(self._store, pin(info))
        except MalformedIndex as error:
            if error.truncated:
                raise _Wait(str(error)) from error
            raise

    def _prove_no_strays(self, strays: Sequence[str], has_index: bool) -> None:
        """One file needs no index; shards and several files do."""
        if has_index or not strays:
            return
        if part := next((key for key in strays if names.is_shard(key)), None):
            if not self._path.endswith("/"):
                raise _Wait(
                    f"{part} is one of several files: put them and their index into one folder, as a checkpoint",
                    needs_person=True,
                )
            raise _Wait(f"{part} is one of several files, and their index ({names.INDEX}) is not there yet")
        if len(strays) > 1:
            raise _Wait(
                f"{self._path} has {len(strays)} weight files and nothing says that these are all: "
                "add an index, or use `weighbridge push`",
                needs_person=self._rests(),
            )

    def _rests(self) -> bool:
        """Whether nothing was written here for a while: an index, which is put last, would be here by now."""
        newest = max(info.modified for info in self._objects.values())
        return (self._now - newest).total_seconds() > _RESTS

    def _header(self, key: str) -> Header:
        try:
            start = read_start(self._store, pin(self._objects[key]))
            if start.length > LARGE:
                self._alone()
            header = start.header()
        except ShortFile as short:
            raise _Wait(str(short)) from short
        self._tensors += len(header.tensors)
        if self._tensors > MAX_TENSORS:
            raise MalformedHeader(f"{self._path} has more than {MAX_TENSORS:,} tensors, our limit", key=key)
        return header

    def _alone(self) -> None:
        """Wait until no other large header or index is in memory; until the end of this look none will be."""
        self._held.enter_context(_ONE_LARGE)  # reentrant

    def _open_uploads(self) -> set[str]:
        return set(self._store.uploads(self._path) or ()) if isinstance(self._store, OpenUploads) else set()

    def _pins(self, keys: Iterable[str]) -> tuple[Ref, ...]:
        return tuple(pin(self._objects[key]) for key in sorted(keys))


def _identity(info: ObjectInfo) -> tuple[int, str, datetime]:
    return info.size, info.etag, info.modified
