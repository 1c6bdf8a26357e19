"""Putting versions away, and bringing them back: what that takes from whom is said first, and an outage is asked for.

What would be lost is found by doing it and taking it back: no second description of what a withdrawal does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import select
from sqlmodel import col

from weighbridge.registry import artifacts, champion, variants, versions
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Conflict, LeavesNothing
from weighbridge.registry.lifecycle import ACTIVE_ROLLOUT, VariantStatus, VersionStatus
from weighbridge.registry.models import Alias, Assignment, Event, Host, Rollout, Version


@dataclass(frozen=True, slots=True)
class Loss:
    """What would be lost if a version was served no more. Hosts by their names."""

    hosts: tuple[str, ...]
    """Those that hold it."""
    aliases: tuple[str, ...]
    """Those that name it."""
    bare: tuple[str, ...]
    """Those of the hosts that would hold nothing of its model any more."""
    champion: int | None
    """The champion that would take its place, or that is another version anyway."""

    @property
    def leaves_nothing(self) -> bool:
        """Whether hosts would serve nothing, or those that join would find no champion where there was one."""
        return bool(self.bare) or (champion.CHAMPION in self.aliases and self.champion is None)


class _TakenBack(Exception):
    """Ends the trial, and with it everything that it wrote."""


def loss(tx: Session, model: str, selector: int | str) -> Loss:
    """Say what archiving a version would take from whom; nothing is changed. Raises NotFound, Conflict."""
    found = versions.get(tx, model, selector)
    lost: Loss | None = None
    try:
        with tx.begin_nested():
            lost = _put_away(tx, model, found.number, actor="", reason="")[1]
            raise _TakenBack
    except _TakenBack:
        tx.expire_all()
    assert lost is not None, "the trial ended by itself"
    return lost


def archive(
    tx: Session, model: str, selector: int | str, *, actor: str, reason: str, force: bool = False
) -> tuple[Version, Loss]:
    """Put a version away; a fleet that serves it goes back to the one before. Return it, and what that took.

    Raises NotFound, Conflict; LeavesNothing where a fleet would serve nothing, unless that is `force`d: then whoever
    leads the transaction must roll it back.
    """
    version, lost = _put_away(tx, model, versions.get(tx, model, selector).number, actor=actor, reason=reason)
    if lost.leaves_nothing and not force:
        raise LeavesNothing(
            f"archiving version {version.number} of {model}",
            model,
            hosts=lost.bare,
            aliases=lost.aliases,
            instead="roll another version out first",
        )
    return version, lost


def unarchive(
    tx: Session, model: str, selector: int | str, there: Callable[[str], bool], *, actor: str, reason: str
) -> Version:
    """Give an archived version back the status that it had, and what it served if nothing took its place.

    `there` tells whether the artifact store has a blob. Raises NotFound; Conflict when it is not archived, or when a
    blob of what was ready is gone.
    """
    version = versions.lock(tx, versions.get(tx, model, selector).id or 0)
    if version.status != VersionStatus.ARCHIVED:
        raise Conflict(f"version {version.number} of {model} is {version.status}, not archived")
    before = _before(tx, version)
    status = VersionStatus(before.get("status", VersionStatus.REJECTED))
    if status is VersionStatus.READY:
        _prove_whole(tx, version, model, there)
    versions.move(tx, version, model, status, before.get("reason", ""), actor=actor, why=reason or "unarchived")
    if status is VersionStatus.READY:
        variants.resume(tx, version)
        champion.restore(tx, version, actor=actor)
    return version


def _put_away(tx: Session, model: str, number: int, *, actor: str, reason: str) -> tuple[Version, Loss]:
    version = versions.lock(tx, versions.get(tx, model, number).id or 0)
    champion.lock(tx, version.model_id)
    aliases = tx.scalars(
        select(col(Alias.name)).where(col(Alias.model_id) == version.model_id, col(Alias.number) == number)
    ).all()
    holders = _holders(tx, version)
    versions.archive(tx, version, model, actor=actor, reason=reason)
    bare = [name for host_id, name in holders.items() if not _has_another(tx, version, host_id)]
    serves = champion.number(tx, version.model_id)
    return version, Loss(tuple(sorted(holders.values())), tuple(sorted(aliases)), tuple(sorted(bare)), serves)


def _holders(tx: Session, version: Version) -> dict[str, str]:
    """The names, by id, of the hosts that were given the version."""
    mine = select(Assignment, col(Host.name)).join(Host, col(Host.id) == col(Assignment.host_id))
    rows = tx.execute(mine.where(col(Assignment.model_id) == version.model_id))
    return {row.host_id: name for row, name in rows if _holds(row, version.number)}


def _holds(row: Assignment, number: int) -> bool:
    return any(slot["version"] == number for slot in row.slots)


def _has_another(tx: Session, version: Version, host_id: str) -> bool:
    """Whether the host is left with another version, or goes back to one with the rollout that gave it this one."""
    row = tx.get_one(Assignment, (host_id, version.model_id), populate_existing=True)
    if not _holds(row, version.number):
        return bool(row.slots)
    going = select(Rollout).where(col(Rollout.model_id) == version.model_id, col(Rollout.status).in_(ACTIVE_ROLLOUT))
    for rollout in tx.scalars(going):
        if host_id in rollout.state.get("given", ()):
            back = rollout.from_number
            return back is not None and champion.slot(tx, version.model_id, back) is not None
    return True  # of a fleet whose rollout a person paused: it keeps what it has until they decide


def _before(tx: Session, version: Version) -> dict[str, str]:
    """Status and reason that it had when it was archived: the event of that says so."""
    told = select(Event).where(col(Event.subject) == f"version:{version.id}", col(Event.kind) == "version.archived")
    last = tx.scalars(told.order_by(col(Event.id).desc()).limit(1)).one_or_none()
    return dict(last.before) if last is not None else {}


def _prove_whole(tx: Session, version: Version, model: str, there: Callable[[str], bool]) -> None:
    """Raise Conflict, naming it, where a blob of what is to be ready again is gone."""
    ready = [row for row in variants.listing(tx, version.id or 0) if row.status == VariantStatus.READY]
    for row in ready:
        for digest in artifacts.blobs(tx, row.artifact_digest or ""):
            if not there(digest):
                raise Conflict(
                    f"version {version.number} of {model} cannot come back: blob {digest} of its {row.name} is not in "
                    "the artifact store any more; drop its checkpoint again"
                )
