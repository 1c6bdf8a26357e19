"""One look at one checkpoint: what the store shows, and what follows. Reads only; the registry is not asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from blake3 import blake3

from weighbridge.daemon.layout import Group, Layout
from weighbridge.daemon.looks import Order, order
from weighbridge.registry.judging import Judges
from weighbridge.storage import completeness, names
from weighbridge.storage import identity as identities
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import ObjectInfo, Ref, Store
from weighbridge.workers import judges


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
    judges: Judges
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
                return Found(files, "", reason, seen, judges.beside(store, layout.folder(group.model)), wrong=reason)
            case completeness.Complete(proof=proof, files=files, reason=reason):
                return Found(files, proof, reason, seen, judges.beside(store, layout.folder(group.model)))
    except judges.Unfit as unfit:
        return Waits(str(unfit), seen, weights)


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
