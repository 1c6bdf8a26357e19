"""What a fleet serves: the champion and what was before it, and the hosts that should hold it but do not yet.

A rollout moves the champion when it finishes. Between rollouts `converge` brings joining hosts to what their fleet
serves, each kind of host to its variant; it never touches a host that a rollout under way was given, nor a fleet whose
rollout a person paused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func
from sqlmodel import col, select

from weighbridge.registry import db, events, hosts, stored
from weighbridge.registry.db import Session
from weighbridge.registry.lifecycle import ACTIVE_ROLLOUT, RolloutStatus, VariantStatus, VersionStatus
from weighbridge.registry.models import Alias, Assignment, Host, Model, Rollout, Variant, Version
from weighbridge.registry.schemas import Slot

log = logging.getLogger(__name__)

CHAMPION, PREVIOUS = "champion", "previous"
ORIGINAL = "original"
_REPLACED = "replaced"
"""In the state of a finished rollout: its version was withdrawn and another took its place, which stays there."""


@dataclass(frozen=True)
class Serving:
    """A version, and which variant of it each kind of host gets, in the form of models.Rollout.variants."""

    number: int
    variants: Mapping[str, Mapping[str, str]]
    pinned: bool = False
    """A person chose the variant: no measurement replaces it."""

    def slot(self, kind: str) -> Slot:
        """What a host of this kind holds; a kind that nobody chose for gets what every other kind gets."""
        entry = self.variants.get(kind) or self.variants[""]
        return Slot(version=self.number, variant=entry["variant"], artifact=entry["artifact"])


def kind(host: Host) -> str:
    """The host's hardware fingerprint; empty: it did not say what it is."""
    return str(host.device.get("kind") or "")


def kinds(tx: Session, labels: Mapping[str, str]) -> set[str]:
    """The kinds of hosts that a fleet has now."""
    return {kind(host) for host in hosts.fleet(tx, labels)}


def fleet_key(labels: Mapping[str, str]) -> str:
    """Canonical JSON of a fleet's labels: how rows name it."""
    return json.dumps(dict(labels), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def number(tx: Session, model_id: int, alias: str = CHAMPION) -> int | None:
    """The version number that the alias names."""
    row = tx.get(Alias, (model_id, alias))
    return None if row is None else row.number


def slot(tx: Session, model_id: int, version: int, variant: str = ORIGINAL) -> Slot | None:
    """The slot that serves one variant of a version; None when it is not ready or has no such artifact."""
    artifact = _ready(tx, model_id, version).get(variant)
    return None if artifact is None else Slot(version=version, variant=variant, artifact=artifact)


def still(
    tx: Session, model_id: int, version: int, given: Mapping[str, Any], *, pinned: bool = False
) -> Serving | None:
    """What was given, as far as it may be served now: the original in place of a variant that is not ready any more.

    None when the version itself may not be served.
    """
    ready = _ready(tx, model_id, version)
    if (artifact := ready.get(ORIGINAL)) is None:
        return None
    found = {"": {"variant": ORIGINAL, "artifact": artifact, "reason": ""}}
    for name, entry in given.items():
        found[name] = dict(entry)
        if ready.get(entry["variant"]) != entry["artifact"]:
            gone = f"{entry['variant']} may not be served any more"
            found[name] = {"variant": ORIGINAL, "artifact": artifact, "reason": gone}
            pinned = False
    return Serving(version, found, pinned)


def _ready(tx: Session, model_id: int, version: int) -> dict[str, str]:
    """The artifacts of a ready version's ready variants, by their names."""
    rows = tx.execute(
        select(col(Variant.name), col(Variant.artifact_digest))
        .join(Version, col(Version.id) == col(Variant.version_id))
        .where(Version.model_id == model_id, Version.number == version, Version.status == VersionStatus.READY)
        .where(Variant.status == VariantStatus.READY, col(Variant.artifact_digest).is_not(None))
    )
    return {name: artifact for name, artifact in rows if artifact is not None}


def finished(tx: Session, model_id: int, fleet: Mapping[str, str], version: int | None = None) -> Serving | None:
    """What a fleet's newest finished rollout (of that version) gave it, while it may be served."""
    query = (
        select(Rollout)
        .where(Rollout.model_id == model_id, Rollout.fleet == fleet_key(fleet))
        .where(Rollout.status == RolloutStatus.FINISHED)
        .order_by(col(Rollout.finished_at).desc(), col(Rollout.id).desc())
        .limit(1)
    )
    if version is not None:
        query = query.where(Rollout.number == version)
    last = tx.scalars(query).one_or_none()
    if last is None or last.state.get(_REPLACED):
        return None
    return still(tx, model_id, last.number, last.variants, pinned=bool(last.state.get("pinned")))


def serving(tx: Session, model_id: int, fleet: Mapping[str, str]) -> Serving | None:
    """What a fleet should serve: its last rollout's while that may be served, else the champion."""
    last = finished(tx, model_id, fleet)
    if last is not None:
        return last
    champion = number(tx, model_id)
    return crowned(tx, model_id, fleet, champion) if champion is not None else None


def crowned(tx: Session, model_id: int, fleet: Mapping[str, str], version: int) -> Serving | None:
    """A version as the fleet had it before, else its original; None when it may not be served."""
    return finished(tx, model_id, fleet, version) or still(tx, model_id, version, {})


def fleets(tx: Session, model_id: int | None = None) -> list[Rollout]:
    """The newest finished rollout of every fleet, newest first: of a host's fleets the first one decides."""
    newest = select(func.max(Rollout.id)).where(Rollout.status == RolloutStatus.FINISHED)
    if model_id is not None:
        newest = newest.where(Rollout.model_id == model_id)
    newest = newest.group_by(col(Rollout.model_id), col(Rollout.fleet))
    return list(tx.scalars(select(Rollout).where(col(Rollout.id).in_(newest)).order_by(col(Rollout.id).desc())))


def crown(tx: Session, rollout: Rollout) -> None:
    """The rollout finished: its version is the champion, the old champion is `previous` while it may be served.

    Other variants of what the fleet served already move no alias, whatever another fleet made the champion.
    """
    old = number(tx, rollout.model_id)
    if old == rollout.number or rollout.from_number == rollout.number:
        return
    actor, reason = f"rollout:{rollout.id}", "the rollout finished"
    if old is not None and slot(tx, rollout.model_id, old) is not None:
        _point(tx, rollout.model_id, PREVIOUS, old, actor=actor, reason=reason)
    elif number(tx, rollout.model_id, PREVIOUS) == rollout.number:
        _point(tx, rollout.model_id, PREVIOUS, None, actor=actor, reason=reason)
    _point(tx, rollout.model_id, CHAMPION, rollout.number, actor=actor, reason=reason)


def withdraw(tx: Session, version: Version, reason: str) -> None:
    """The version may not be served any more: `previous` takes the place of a champion, and the hosts follow.

    One at a time of a model: two that go at once must not each count on the other.
    """
    lock(tx, version.model_id)
    tx.flush()  # the version's new status decides what `slot` finds below
    words = f"version {version.number} was withdrawn: {reason}"
    before = number(tx, version.model_id, PREVIOUS)
    if before is not None and slot(tx, version.model_id, before) is None:
        _point(tx, version.model_id, PREVIOUS, None, actor="weighbridge", reason=words)
        before = None
    if number(tx, version.model_id) == version.number:
        _point(tx, version.model_id, CHAMPION, before, actor="weighbridge", reason=words)
        if before is not None:
            _point(tx, version.model_id, PREVIOUS, None, actor="weighbridge", reason=words)
    if number(tx, version.model_id) is not None:
        for rollout in fleets(tx, version.model_id):
            if rollout.number == version.number:
                rollout.state = {**rollout.state, _REPLACED: True}
                tx.add(rollout)
        tx.flush()
    converge(tx, version.model_id)


def lock(tx: Session, model_id: int) -> None:
    """Hold the model's row until the transaction's end; after the version's, before the rollouts'."""
    tx.get_one(Model, model_id, with_for_update={"key_share": True}, populate_existing=True)


def restore(tx: Session, version: Version, *, actor: str) -> None:
    """The version is ready again: where nothing took its place, it is what its fleets serve, and the champion."""
    mine = [rollout for rollout in fleets(tx, version.model_id) if rollout.number == version.number]
    if number(tx, version.model_id) is None and mine:
        reason = f"version {version.number} is back, and nothing had taken its place"
        _point(tx, version.model_id, CHAMPION, version.number, actor=actor, reason=reason)
    converge(tx, version.model_id)


def converge(tx: Session, model_id: int | None = None) -> list[str]:
    """Assign what their fleet serves to hosts that hold something else. Returns the ids of the hosts it changed.

    A host of several fleets follows the fleet whose rollout finished last.
    """
    busy = _Busy.lock(tx, model_id)
    changed: list[str] = []
    settled: set[tuple[int, str]] = set()
    for rollout in fleets(tx, model_id):
        try:
            changed += _converge_fleet(tx, rollout, busy, settled)
        except stored.BROKEN as exc:
            log.warning("rollout %s cannot be read, its hosts stay as they are: %s", rollout.id, exc)
    return changed


def _converge_fleet(tx: Session, rollout: Rollout, busy: _Busy, settled: set[tuple[int, str]]) -> list[str]:
    labels = stored.labels(rollout.fleet)
    wanted = serving(tx, rollout.model_id, labels)
    changed: list[str] = []
    for host in hosts.fleet(tx, labels):
        key = (rollout.model_id, host.id)
        if key in settled:
            continue
        settled.add(key)
        if key in busy.given or (rollout.model_id, rollout.fleet) in busy.paused:
            continue
        slots = [wanted.slot(kind(host))] if wanted is not None else []
        held = tx.get(Assignment, (host.id, rollout.model_id))
        if (held.slots if held else []) != [slot.model_dump(mode="json") for slot in slots]:
            hosts.assign(tx, host.id, rollout.model_id, slots, rollout.id)
            changed.append(host.id)
    return changed


@dataclass(frozen=True)
class _Busy:
    """What belongs to rollouts under way: hosts that they were given, and fleets whose rollout a person paused."""

    given: set[tuple[int, str]]
    paused: set[tuple[int, str]]

    @classmethod
    def lock(cls, tx: Session, model_id: int | None) -> _Busy:
        """Read it and hold the rollouts' rows, before any host's: a step takes its locks in the same order."""
        going = select(Rollout).where(col(Rollout.status).in_(ACTIVE_ROLLOUT)).order_by(col(Rollout.id))
        if model_id is not None:
            going = going.where(Rollout.model_id == model_id)
        rows = tx.scalars(going.with_for_update(), execution_options={"populate_existing": True}).all()
        return cls(
            given={(row.model_id, host) for row in rows for host in given(row)},
            paused={(row.model_id, row.fleet) for row in rows if row.status == RolloutStatus.PAUSED},
        )


def given(rollout: Rollout) -> tuple[str, ...]:
    """The hosts that a rollout gave its version to; none where its row does not say any more."""
    named = rollout.state.get("given", [])
    return tuple(named) if isinstance(named, list) else ()


def _point(tx: Session, model_id: int, name: str, version: int | None, *, actor: str, reason: str) -> None:
    """Move an alias, or remove it, and say so."""
    row = tx.get(Alias, (model_id, name))
    old = row.number if row else None
    if old == version:
        return
    if row is None:
        assert version is not None
        tx.add(Alias(model_id=model_id, name=name, number=version))
    elif version is None:
        tx.delete(row)
    else:
        row.number, row.revision, row.updated_at = version, row.revision + 1, db.clock(tx)
        tx.add(row)
    tx.flush()
    events.record(
        tx,
        "alias.moved" if version is not None else "alias.deleted",
        model=tx.get_one(Model, model_id).name,
        version=version,
        subject=f"alias:{name}",
        before={"number": old},
        after={"number": version},
        actor=actor,
        reason=reason,
    )
