"""One look at one checkpoint: what the store shows, and what follows. Reads only; the registry is not asked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

from blake3 import blake3

from weighbridge.daemon.layout import Group, Layout
from weighbridge.daemon.looks import Order, order
from weighbridge.registry.judging import Judges
from weighbridge.storage import completeness, names
from weighbridge.storage import identity as identities
from weighbridge.storage.errors import AccessDenied, NotSupported, ObjectArchived, StorageError
from weighbridge.storage.lineage import Lineage
from weighbridge.storage.pins import pin
from weighbridge.storage.protocols import ObjectInfo, PassedOver, Ref, Store
from weighbridge.workers import judges

_FOR_PEOPLE = (AccessDenied, ObjectArchived, NotSupported)
"""What a store answers that no waiting changes: a right, an archive, a call that it does not know."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing is there (any more)."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Not complete, or judged by something that is not; `reason` says what to do. `weights` are there already.

    `failed`: it could not be looked at, so that nothing is known of what is there now. `needs_person`: waiting alone
    will not help.
    """

    reason: str
    seen: str
    weights: tuple[Ref, ...] = ()
    failed: bool = False
    needs_person: bool = False


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
    lineage: Lineage = field(default_factory=Lineage)

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
    """List the group, assess it, read what judges it.

    What fails for this group alone is its reason to wait. What fails for the whole store, as the store itself says when
    it is asked, is raised (StorageUnavailable and the like): then nothing is known.
    """
    seen = ""
    try:
        found = _found(store, layout, group)
        seen = digest(found)
        return _judged(store, layout, group, found, seen, now) if layout.holds(group) else _passed(found, seen)
    except StorageError as error:
        store.check()
        needs_person = isinstance(error, _FOR_PEOPLE)
        return Waits(f"{group.path} cannot be looked at: {error}", seen, failed=True, needs_person=needs_person)


def digest(found: Iterable[ObjectInfo | PassedOver]) -> str:
    """Identity of a group's listing, in the store's order: BLAKE3, 32 hex digits."""
    hasher = blake3()
    for one in islice(found, completeness.MAX_OBJECTS):
        hasher.update(identity(one))
    return hasher.hexdigest(16)


def identity(one: ObjectInfo | PassedOver) -> bytes:
    """What tells one content of one key from another in a listing. Cheap: there may be millions."""
    if isinstance(one, PassedOver):
        return f"{one.key}\0{one.reason}\n".encode()
    moment = int(one.modified.timestamp() * 1e6)
    return f"{one.key}\0{one.size}\0{one.etag}\0{one.version_id}\0{moment}\n".encode()


def _found(store: Store, layout: Layout, group: Group) -> list[ObjectInfo | PassedOver]:
    """What lies at the group's path; where that is no checkpoint's, what a listing passed over there."""
    if layout.holds(group):
        return completeness.surveyed(store, group.path)
    # As far as the path is as the store spells it: `shown` escapes with backslashes and cuts with an ellipsis.
    listed = islice(store.survey(re.split(r"[\\…]", group.path)[0]), completeness.MAX_OBJECTS)
    return [one for one in listed if isinstance(one, PassedOver) and one.key == group.path]


def _passed(found: Sequence[ObjectInfo | PassedOver], seen: str, weights: tuple[Ref, ...] = ()) -> Finding:
    """What the first thing that a listing passed over means for the group; Gone where there is none."""
    for one in found:
        if isinstance(one, PassedOver):
            reason = f"{one.key}: {one.reason}"
            if one.error is None:
                return Refused(reason, seen, weights)
            return Waits(reason, seen, weights, needs_person=isinstance(one.error, _FOR_PEOPLE))
    return Gone()


def _judged(
    store: Store,
    layout: Layout,
    group: Group,
    found: Sequence[ObjectInfo | PassedOver],
    seen: str,
    now: datetime | None,
) -> Finding:
    """What follows from a group's own listing."""
    if not found:
        return Gone()
    if (unfit := _unfit(group, found)) is not None:
        return Refused(f"{group.path}: {unfit}", seen)
    if names.is_unfinished(group.name):
        return Waits(f"{group.path} is marked unfinished by its name", seen)
    objects = [one for one in found if isinstance(one, ObjectInfo)]
    weights = identities.weights(pin(info) for info in objects if not names.is_hidden(info.key[len(group.path) :]))
    passed = [one for one in found if isinstance(one, PassedOver)]
    if missed := [one for one in passed if one.error or not objects or _matters(one.key)]:
        return _passed(missed, seen, weights)
    verdict = completeness.assess(store, objects, path=group.path, now=now)
    more = f"; passed over: {passed[0].key} ({passed[0].reason})" if passed else ""
    try:
        match verdict:
            case completeness.Waiting(reason=reason, needs_person=needs_person):
                return Waits(reason + more, seen, weights, needs_person=needs_person)
            case completeness.Unsupported(reason=reason):
                return Refused(reason + more, seen, weights)
            case completeness.Refused(reason=reason, files=files):
                return Found(files, "", reason, seen, _judges(store, group), wrong=reason)
            case completeness.Complete(proof=proof, files=files, reason=reason, lineage=said):
                return Found(files, proof, reason + more, seen, _judges(store, group), lineage=said)
    except judges.Unfit as fault:
        return Waits(str(fault), seen, weights, needs_person=fault.needs_person)


def _unfit(group: Group, found: Sequence[object]) -> str | None:
    """Why nothing at this path can be a checkpoint, told from names and numbers alone."""
    if group.fault is not None:
        return group.fault
    if not group.folder and (right := names.meant(group.name)) is not None:
        return f"it is not read under this name: call it {right}"
    if len(found) > completeness.MAX_OBJECTS:
        return f"it holds more than {completeness.MAX_OBJECTS:,} objects: a checkpoint has at most so many"
    return None


def _judges(store: Store, group: Group) -> Judges:
    """What lies beside it. Raises Unfit while that is being written, or is wrong."""
    return judges.beside(store, judges.folders_of(group.path, group.model))


def _matters(key: str) -> bool:
    """Whether a checkpoint without this file may be another one: weights, an index, a configuration."""
    return names.is_candidate(key) or key.endswith(".json")
