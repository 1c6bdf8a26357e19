"""Which variant a rollout gives to each kind of host: by measurement, by hand, or a better one than what is served.

`placement` says what is best for a kind of device; here it becomes what a rollout pins at its start
(models.Rollout.variants), so that a measurement that comes later does not change a rollout under way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlmodel import col, select

from weighbridge.registry import artifacts, champion
from weighbridge.registry.champion import Serving
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Conflict
from weighbridge.registry.lifecycle import RolloutStatus, VariantStatus
from weighbridge.registry.models import Rollout, Version
from weighbridge.registry.schemas import Choice

Variants = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Better:
    """Other variants than a fleet serves, and in words which kind goes from what to what, and why."""

    variants: Variants
    reason: str


def measured(tx: Session, version: Version, kinds: Collection[str]) -> Variants:
    """What the measurements choose for these kinds, and for every other ("")."""
    return {kind: _entry(choice) for kind, choice in _choices(tx, version, kinds).items()}


def by_hand(tx: Session, version: Version, kinds: Collection[str], name: str) -> Variants:
    """One variant for every kind, on a person's word. Raises NotFound, Conflict when it is not ready."""
    assert version.id is not None
    row = artifacts.find_variant(tx, version.id, name)
    if row.status != VariantStatus.READY or row.artifact_digest is None:
        why = f": {row.reason}" if row.reason else ""
        raise Conflict(f"variant {name} of version {version.number} is {row.status}{why}; only a ready one is served")
    entry = {"variant": name, "artifact": row.artifact_digest, "reason": "chosen by hand"}
    return {kind: dict(entry) for kind in {"", *kinds}}


def differ(now: Serving, wanted: Variants, kinds: Collection[str]) -> bool:
    """Whether some host of these kinds would get another variant than it was given."""
    after = Serving(now.number, wanted)
    return any(now.slot(kind) != after.slot(kind) for kind in kinds)


def better(tx: Session, version: Version, now: Serving, fleet: Mapping[str, str]) -> Better | None:
    """What the fleet's kinds should have instead of what they serve of this version; None: they have it.

    A kind keeps what it serves where it went back from what would be better.
    """
    kinds = champion.kinds(tx, fleet)
    barred = _went_back(tx, version, fleet)
    wanted: Variants = {}
    changes: list[str] = []
    for kind, choice in sorted(_choices(tx, version, kinds).items()):
        held = now.slot(kind)
        wanted[kind] = _entry(choice)
        if kind not in kinds or choice.artifact == held.artifact:
            continue
        if (kind, choice.artifact) in barred:
            wanted[kind] = {
                "variant": held.variant,
                "artifact": held.artifact,
                "reason": f"{choice.variant} went back before",
            }
            continue
        why = f" ({choice.reason})" if choice.reason else ""
        changes.append(f"{choice.label or kind or 'hosts of no known kind'}: {held.variant} → {choice.variant}{why}")
    return Better(wanted, "; ".join(changes)) if changes else None


def _choices(tx: Session, version: Version, kinds: Collection[str]) -> dict[str, Choice]:
    from weighbridge.registry import placement  # late: versions start rollouts, and placement reads versions

    return placement.choices(tx, version, kinds)


def _entry(choice: Choice) -> dict[str, str]:
    return {"variant": choice.variant, "artifact": choice.artifact, "reason": choice.reason}


def _went_back(tx: Session, version: Version, fleet: Mapping[str, str]) -> set[tuple[str, str]]:
    """(kind, artifact) of what a rollout of this version over itself would have changed, and did not keep."""
    ended = (
        select(Rollout)
        .where(Rollout.model_id == version.model_id, Rollout.fleet == champion.fleet_key(fleet))
        .where(Rollout.number == version.number, Rollout.from_number == version.number)
        .where(col(Rollout.status).in_([RolloutStatus.ROLLED_BACK, RolloutStatus.ABORTED]))
    )
    found = set()
    for row in tx.scalars(ended):
        before, after = Serving(row.number, row.from_variants), Serving(row.number, row.variants)
        for kind in {*row.variants, *row.from_variants}:
            if after.slot(kind) != before.slot(kind):
                found.add((kind, after.slot(kind).artifact))
    return found
