"""What a rollout's next step is decided on, read from the rows within its transaction."""

from __future__ import annotations

from dataclasses import asdict, astuple, replace
from typing import Any

from sqlmodel import col, select

from weighbridge.registry import champion, db, hosts, stored
from weighbridge.registry.champion import Serving
from weighbridge.registry.db import Session
from weighbridge.registry.lifecycle import RolloutStatus, VariantStatus, VersionStatus
from weighbridge.registry.models import Assignment, Host, Rollout, Variant, Version
from weighbridge.registry.recipe import RolloutSettings
from weighbridge.registry.schemas import Slot
from weighbridge.workers.judge import NOTHING, Counts
from weighbridge.workers.next_step import HostSeen, Observations, RolloutView, SlotSeen


def look(tx: Session, rollout: Rollout) -> tuple[RolloutView, Observations]:
    """Read everything that `next_step` decides on."""
    settings, unreadable = _settings(rollout)
    given = tuple(rollout.state.get("given", ()))
    wish = rollout.request or {}
    words = f"aborted by {wish.get('actor') or 'a person'}" + (f": {wish['reason']}" if wish.get("reason") else "")
    view = RolloutView(
        number=rollout.number,
        status=RolloutStatus(rollout.status),
        settings=settings,
        wave=rollout.wave,
        given=given,
        promoted=rollout.state.get("promoted", 0),
        abort=words if wish.get("verb") == "abort" else "",
        unreadable=unreadable,
    )
    now = db.clock(tx)
    return view, Observations(now, _hosts(tx, rollout, settings, given, now), _withdrawn(tx, rollout))


def _settings(rollout: Rollout) -> tuple[RolloutSettings, str]:
    """How it moves; or, where that cannot be read any more, the defaults to go back by, and why."""
    try:
        return stored.parse(RolloutSettings, rollout.settings, f"the settings of rollout {rollout.id}"), ""
    except stored.Unreadable as exc:
        return RolloutSettings(fleet=stored.labels(rollout.fleet)), f"{exc}; abort it and start another"


def forth(rollout: Rollout) -> Serving:
    """What the rollout gives: to each kind of host the variant that was chosen when it started."""
    return Serving(rollout.number, rollout.variants)


def back(tx: Session, rollout: Rollout) -> Serving | None:
    """What a roll back returns to: what served before, else the champion, whichever may still be served; else None."""
    if rollout.from_number is not None:
        before = champion.still(tx, rollout.model_id, rollout.from_number, rollout.from_variants)
        if before is not None:
            return before
    crowned = champion.number(tx, rollout.model_id)
    if crowned is None or crowned == rollout.number:
        return None
    return champion.crowned(tx, rollout.model_id, stored.labels(rollout.fleet), crowned)


def _withdrawn(tx: Session, rollout: Rollout) -> str:
    version = tx.scalars(
        select(Version).where(Version.model_id == rollout.model_id, Version.number == rollout.number)
    ).one()
    if version.status != VersionStatus.READY:
        return f"version {version.number} is {version.status}: {version.reason}"
    given = {entry["artifact"]: entry["variant"] for entry in rollout.variants.values()}
    rows = tx.scalars(select(Variant).where(Variant.version_id == version.id, col(Variant.name).in_(given.values())))
    for variant in rows.all():
        if variant.status != VariantStatus.READY or variant.artifact_digest not in given:
            why = variant.reason or "it was built anew"
            return f"variant {variant.name} of version {version.number} is {variant.status}: {why}"
    return ""


def _hosts(
    tx: Session, rollout: Rollout, settings: RolloutSettings, given: tuple[str, ...], now: float
) -> tuple[HostSeen, ...]:
    """The fleet's hosts, and those that were touched and left it but are not retired."""
    fleet = {host.id: host for host in hosts.fleet(tx, settings.fleet)}
    left = [host_id for host_id in given if host_id not in fleet]
    others = tx.scalars(select(Host).where(col(Host.id).in_(left), Host.state != "retired")).all() if left else []
    everyone = [*fleet.values(), *others]
    held = {
        row.host_id: row
        for row in tx.scalars(
            select(Assignment)
            .where(Assignment.model_id == rollout.model_id)
            .where(col(Assignment.host_id).in_([host.id for host in everyone]))
        )
    }
    before = back(tx, rollout)
    found = []
    for host in everyone:
        row, kind = held.get(host.id), champion.kind(host)
        wanted = _given(rollout, row) if host.id in given else None
        wanted = wanted or forth(rollout).slot(kind)
        seen = _host(host, row, host.id in fleet, now)
        holds = row is not None and row.slots == [wanted.model_dump(mode="json")]
        old = before.slot(kind).artifact if before is not None else None
        marked = rollout.state.get("before", {}).get(host.id)
        found.append(
            replace(seen, wanted=wanted.artifact, back=old, holds=holds, before=Counts(*marked) if marked else NOTHING)
        )
    return tuple(found)


def _given(rollout: Rollout, held: Assignment | None) -> Slot | None:
    """What this rollout gave to a host, also when the host is of another kind since (a newer engine, say)."""
    mine = {entry["artifact"] for entry in rollout.variants.values()}
    slots = [Slot.model_validate(slot) for slot in held.slots] if held is not None else []
    return next((slot for slot in slots if slot.version == rollout.number and slot.artifact in mine), None)


def _host(host: Host, held: Assignment | None, in_fleet: bool, now: float) -> HostSeen:
    silent = max(0.0, now - (host.seen_at if host.seen_at is not None else host.created_at))
    if held is None:
        return HostSeen(host.id, silent, in_fleet)
    return HostSeen(
        host.id,
        silent,
        in_fleet,
        generation=held.generation,
        artifacts=tuple(slot["artifact"] for slot in held.slots),
        assigned_at=held.assigned_at,
        live_at=held.live_at,
        observed_generation=held.observed.get("generation", 0),
        slots=tuple(
            SlotSeen(slot["artifact"], slot["state"], slot.get("golden", "unchecked"), slot.get("reason", ""))
            for slot in held.observed.get("slots", ())
        ),
        counts=Counts(held.requests, held.errors, held.input_errors, held.refused),
    )


def marks(rollout: Rollout, seen: Observations, given: tuple[str, ...]) -> dict[str, list[int]]:
    """What every host had counted when this rollout began, and those that are given the new version: by now."""
    before: dict[str, list[int]] = dict(rollout.state.get("before", {}))
    for host in seen.hosts:
        if host.id in given or host.id not in before:
            before[host.id] = list(astuple(host.counts))
    return before


def numbers(seen: Observations) -> dict[str, Any]:
    """What was seen, small enough to keep with every step."""
    return {
        "at": seen.now,
        "hosts": {
            host.id: {
                "silent": round(host.silent, 3),
                "generation": host.generation,
                "observed": host.observed_generation,
                "slots": {slot.artifact[:12]: f"{slot.state}, golden {slot.golden}" for slot in host.slots},
                "live_for": None if host.live_at is None else round(seen.now - host.live_at, 3),
                **asdict(host.counts),
            }
            for host in seen.hosts
        },
    }
