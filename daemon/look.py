"""One look at one checkpoint: what the store shows, and what follows. Reads only; the registry is not asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from blake3 import blake3

from weighbridge.daemon.layout import Group, Layout
from weighbridge.daemon.looks import Order, order
from weighbridge.registry import recipe
from weighbridge.registry.errors import InvalidRecipe
from weighbridge.storage import completeness, names
from weighbridge.storage import identity as identities
from weighbridge.storage.errors import InvalidKey, ObjectNotFound, PreconditionFailed
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import ObjectInfo, OpenWriter, Ref, Store
from weighbridge.storage.safetensors_header import MalformedHeader, ShortFile, read_header

MAX_RECIPE = 1 << 20
"""Bytes of a recipe that are read."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing is there (any more)."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Not complete, or judged by something that is not; `reason` says what to do. `weights` are there already."""

    reason: str
    seen: str
    weights: tuple[Ref, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Will never become a version as it is."""

    reason: str
    seen: str
    weights: tuple[Ref, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint, pinned with what judges it. `wrong`: its content is wrong for good."""

    files: tuple[Ref, ...]
    proof: str
    reason: str
    seen: str
    recipe_text: str | None
    eval_pin: Ref | None
    train_pin: Ref | None
    wrong: str | None = None

    @property
    def weights(self) -> tuple[Ref, ...]:
        return identities.weights(self.files)

    def order(self, group: Group) -> Order:
        """Its place among its model's checkpoints: when its weights were written."""
        return order(identities.written_at(self.weights) or 0.0, group.path)

    @property
    def unproven(self) -> bool:
        return self.proof == completeness.Proof.P3

    def may_grow(self, group: Group) -> bool:
        """Whether files that its proof does not name may follow: a config or a tokenizer beside the weights."""
        return group.folder and self.wrong is None and self.proof != completeness.Proof.P0


Finding = Gone | Waits | Refused | Found


class _Wait(Exception):
    """What judges the checkpoint is not fit to judge."""


def look(store: Store, layout: Layout, group: Group, *, now: datetime | None = None) -> Finding:
    """List the group, assess it, read what judges it. Raises StorageUnavailable and the like: then nothing is known."""
    objects = completeness.listed(store, group.path)
    if not objects:
        return Gone()
    seen = digest(objects)
    if group.fault is not None:
        return Refused(f"{group.path}: {group.fault}", seen)
    if names.is_unfinished(group.name):
        return Waits(f"{group.path} is marked unfinished by its name", seen)
    verdict = completeness.assess(store, objects, path=group.path, now=now)
    weights = identities.weights(pin(info) for info in objects if not names.is_hidden(info.key[len(group.path) :]))
    try:
        match verdict:
            case completeness.Waiting(reason=reason):
                return Waits(reason, seen, weights)
            case completeness.Unsupported(reason=reason):
                return Refused(reason, seen, weights)
            case completeness.Refused(reason=reason, files=files):
                return Found(files, "", reason, seen, *_judges(store, layout, group.model), wrong=reason)
            case completeness.Complete(proof=proof, files=files, reason=reason):
                return Found(files, proof, reason, seen, *_judges(store, layout, group.model))
    except _Wait as wait:
        return Waits(str(wait), seen, weights)


def digest(objects: Iterable[ObjectInfo]) -> str:
    """Identity of a group's listing, in the store's order: BLAKE3, 32 hex digits."""
    hasher = blake3()
    for info in objects:
        hasher.update(identity(info))
    return hasher.hexdigest(16)


def identity(info: ObjectInfo) -> bytes:
    """What tells one content of one key from another in a listing. Cheap: there may be millions."""
    moment = int(info.modified.timestamp() * 1e6)
    return f"{info.key}\0{info.size}\0{info.etag}\0{info.version_id}\0{moment}\n".encode()


def _judges(store: Store, layout: Layout, model: str) -> tuple[str | None, Ref | None, Ref | None]:
    """The recipe's text and both sets' pins. Raises _Wait while one of them is being written, or is wrong."""
    return (
        _recipe(store, layout.recipe(model)),
        _dataset(store, layout.evaluation(model), "evaluation"),
        _dataset(store, layout.training(model), "training"),
    )


def _recipe(store: Store, key: str) -> str | None:
    found = _settled(store, key)
    if found is None:
        return None
    if found.size > MAX_RECIPE:
        raise _Wait(f"{key} has {found.size:,} bytes; a recipe has at most {MAX_RECIPE:,}")
    try:
        text = store.get(key, if_match=found)
        recipe.parse(text, name=key)
        return text.decode()
    except InvalidRecipe as error:
        raise _Wait(f"the recipe is invalid: {error}") from error
    except (ObjectNotFound, PreconditionFailed) as error:
        raise _Wait(f"{key} changed while it was read") from error


def _dataset(store: Store, key: str, which: str) -> Ref | None:
    found = _settled(store, key)
    if found is None:
        return None
    try:
        read_header(store, found)
    except (ShortFile, MalformedHeader) as error:
        raise _Wait(f"the {which} set is not whole: {error}") from error
    except (ObjectNotFound, PreconditionFailed) as error:
        raise _Wait(f"{key} changed while it was read") from error
    return found


def _settled(store: Store, key: str) -> Ref | None:
    """Pin a file that judges, if there is one. Raises _Wait while somebody writes it."""
    try:
        found = pin(store.head(key))
        if isinstance(store, OpenWriter) and store.has_writer(key):
            raise _Wait(f"{key} is still open for writing")
    except ObjectNotFound:
        return None
    except InvalidKey as error:
        raise _Wait(str(error)) from error
    return found
