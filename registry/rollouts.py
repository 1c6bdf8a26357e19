"""The verbs of rollouts: start, by a person or by itself; a person's decisions; withdrawal of a version.

A rollout moves a fleet to another version, or to better variants of the version that it serves.

What a rollout does next is decided in workers.next_step; here is what people and the lifecycle may ask of it. Every
function takes an open transaction and leaves the commit to its owner, who rings "jobs", "events" and "hosts" after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from sqlmodel import col, select

from weighbridge.registry import (
    catalog,
    champion,
    events,
    hosts,
    identity,
    jobs,
    lifecycle,
    rollout_settings,
    rollout_variants,
    stored,
    versions,
)
from weighbridge.registry.champion import Serving
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Conflict, LeavesNothing, NotFound
from weighbridge.registry.lifecycle import ACTIVE_ROLLOUT, RolloutStatus, Stage, VersionStatus
from weighbridge.registry.models import Job, Model, Rollout, RolloutStep, Version
from weighbridge.registry.recipe import NO_POLICY, Policy, RolloutSettings, policy_for
from weighbridge.registry.rollout_variants import Better, Variants

_SELF = "weighbridge"
Verb = Literal["pause", "resume", "abort", "promote", "approve"]
_R = RolloutStatus
_GOING = frozenset({_R.RUNNING, _R.HOLDING})
_ALLOWED: Mapping[str, frozenset[RolloutStatus]] = MappingProxyType(
    {
        "approve": frozenset({_R.PENDING}),
        "pause": _GOING,
        "resume": frozenset({_R.PAUSED}),
        "promote": _GOING,
        "abort": _GOING | {_R.PENDING, _R.PAUSED},
    }
)
_BECOMES = MappingProxyType({"approve": _R.RUNNING, "resume": _R.RUNNING, "pause": _R.PAUSED})
_PAST = MappingProxyType(
    {"approve": "approved", "pause": "paused", "resume": "resumed", "promote": "promoted", "abort": "abort_asked"}
)


def start(
    tx: Session,
    model: str,
    selector: int | str | None = None,
    *,
    variant: str | None = None,
    settings: Mapping[str, Any] | None = None,
    policies: tuple[Policy, ...] = (),
    actor: str,
    reason: str = "",
) -> Rollout:
    """Start by hand the rollout of a version: by number, alias or `latest`; None: the newest ready one.

    `variant` is for every kind of host, and no measurement replaces it later; None: each kind gets what is measured to
    be best for it. `settings` override the recipe's rollout part. Raises NotFound, Conflict (not ready, served already,
    or one is under way), Invalid (a setting that is unknown, wrong, or that the policy overrules).
    """
    row = catalog.get(tx, model)
    version = _version(tx, row, selector)
    chosen = rollout_settings.overridden(
        rollout_settings.of(tx, version, NO_POLICY), settings or {}, policy_for(model, policies)
    )
    return _start(tx, row, version, chosen, variant=variant, actor=actor, reason=reason)


def start_automatic(tx: Session, model_id: int, policies: tuple[Policy, ...] = ()) -> Rollout | None:
    """Start the rollout of the newest ready version, where policy and recipe say so; None where there is nothing to do.

    The newest is whose weights were written last. Never of an unproven version, of one that had a rollout before, of
    one older than the champion (`held` says so), or beside another.
    """
    model = tx.get_one(Model, model_id)
    version = _newest(tx, model_id)
    if version is None or _had_rollout(tx, version) or not _is_newer(tx, version):
        return None
    settings = rollout_settings.of(tx, version, policy_for(model.name, policies))
    if not settings.automatic:
        return None
    if (other := active(tx, model_id, settings.fleet)) is not None:
        _make_way(tx, other, version)
        return None
    try:
        return _start(tx, model, version, settings, actor=_SELF, reason="automatic: the version became ready")
    except Conflict:  # another transaction was faster; its end starts the newest
        return None


def held(tx: Session, version: Version, policies: tuple[Policy, ...] = ()) -> str | None:
    """Why a ready version does not roll out by itself though its recipe says so: it is older than the champion."""
    model = tx.get_one(Model, version.model_id)
    settings = rollout_settings.of(tx, version, policy_for(model.name, policies))
    serves = champion.number(tx, version.model_id)
    if not settings.automatic or version.unproven or serves in (None, version.number) or _is_newer(tx, version):
        return None
    return (
        f"its weights were written before those of the champion, version {serves}: it does not roll out by itself; "
        f"`weighbridge rollouts start {model.name} {version.number}` rolls it out"
    )


def start_again(tx: Session, duplicate: Version, policies: tuple[Policy, ...] = ()) -> Rollout | None:
    """Weights that are known came again: roll out the version that they are, only where the recipe says `again`."""
    model = tx.get_one(Model, duplicate.model_id)
    settings = rollout_settings.of(tx, duplicate, policy_for(model.name, policies))
    assert duplicate.duplicate_of is not None
    version = _numbered(tx, duplicate.model_id, duplicate.duplicate_of)
    if not settings.automatic or not settings.again or duplicate.unproven or version.unproven:
        return None
    if version.status != VersionStatus.READY or champion.number(tx, duplicate.model_id) == version.number:
        return None
    reason = f"automatic: its weights came again, as version {duplicate.number}"
    try:
        return _start(tx, model, version, settings, actor=_SELF, reason=reason)
    except Conflict:  # one is under way: the duplicate's reason says how to start it afterwards
        return None


def improve(tx: Session, model_id: int, policies: tuple[Policy, ...] = ()) -> Rollout | None:
    """Start the rollout of better variants of what a fleet serves, where policy and recipe say so; None: nothing to do.

    One fleet at a time, the one that was moved last first. Never while the version's variants are still made or
    measured, beside another rollout, against a person's choice, nor of what a kind of host went back from.
    """
    from weighbridge.registry import variants  # late: versions start rollouts, and variants belong to versions

    decided: set[str] = set()
    for last in champion.fleets(tx, model_id):
        try:
            labels = stored.labels(last.fleet)
        except stored.Unreadable:
            continue
        members = {host.id for host in hosts.fleet(tx, labels)}
        follows = members.isdisjoint(decided)  # else some serve what another fleet's newer rollout gave them
        decided |= members
        now = champion.serving(tx, model_id, labels)
        if not follows or now is None or now.pinned or active(tx, model_id, labels) is not None:
            continue
        version = _numbered(tx, model_id, now.number)
        if variants.settled(tx, version.id or 0) and (found := _improve(tx, version, now, labels, policies)):
            return found
    return None


def decide(tx: Session, rollout_id: int, verb: Verb, *, actor: str, reason: str = "", force: bool = False) -> Rollout:
    """Carry out a person's decision.

    Raises NotFound, Conflict where the rollout's status does not allow it; LeavesNothing for an `abort` whose hosts
    served something before that may not be served any more, unless it is `force`d.
    """
    rollout = lock(tx, rollout_id)
    status = RolloutStatus(rollout.status)
    if status not in _ALLOWED[verb]:
        allowed = ", ".join(sorted(_ALLOWED[verb]))
        raise Conflict(f"rollout {rollout_id} is {status}: {verb} is possible when it is {allowed}")
    if verb in _BECOMES:
        move(rollout, _BECOMES[verb], "" if verb != "pause" else f"paused by {actor}" + (reason and f": {reason}"))
    elif verb == "abort":
        if not force:
            _prove_a_way_back(tx, rollout)
        rollout.request = {"verb": verb, "actor": actor, "reason": reason}
    else:
        rollout.state = {**rollout.state, "promoted": rollout.wave}
    add_step(tx, rollout, verb, {"reason": reason} if reason else {}, actor=actor)
    report(tx, rollout, _PAST[verb], before={"status": status}, actor=actor, reason=reason)
    jobs.wake(tx, "rollout", rollout_id)
    return rollout


def _prove_a_way_back(tx: Session, rollout: Rollout) -> None:
    """Raise LeavesNothing where what its hosts served before was withdrawn. A first rollout has nothing to go back to,
    and took nothing from anybody."""
    given, back = rollout.state.get("given", ()), rollout.from_number
    if not given or back is None or champion.slot(tx, rollout.model_id, back) is not None:
        return
    model = tx.get_one(Model, rollout.model_id).name
    names = [hosts.get(tx, host_id).name for host_id in given]
    raise LeavesNothing(
        f"aborting rollout {rollout.id} (version {back}, before it, may not be served any more)",
        model,
        hosts=names,
        instead=f"`weighbridge unarchive {model} {back}`, or let it go on",
    )


def keep_served(tx: Session, rollout: Rollout) -> None:
    """Before anything was given: the original in place of a variant that may not be served any more."""
    if rollout.state.get("given"):
        return
    found = champion.still(tx, rollout.model_id, rollout.number, rollout.variants)
    if found is not None and found.variants != rollout.variants:
        rollout.variants = dict(found.variants)
        tx.add(rollout)


def withdraw(tx: Session, version: Version, reason: str) -> None:
    """A version may not be served any more: its rollouts go back, and if it is the champion, the one before it is."""
    assert version.id is not None
    for rollout in tx.scalars(
        select(Rollout)
        .where(Rollout.model_id == version.model_id, Rollout.number == version.number)
        .where(col(Rollout.status).in_(ACTIVE_ROLLOUT))
    ):
        assert rollout.id is not None
        jobs.wake(tx, "rollout", rollout.id)
    champion.withdraw(tx, version, reason)


def converge_champion(tx: Session) -> list[str]:
    """Repair drift: give every host that joined a fleet what the fleet serves. Returns the ids of the hosts changed.

    Rollouts that hold look again: the host that they miss may be the one that joined.
    """
    for rollout_id in tx.scalars(select(Rollout.id).where(Rollout.status == RolloutStatus.HOLDING)):
        assert rollout_id is not None
        jobs.wake(tx, "rollout", rollout_id)
    return champion.converge(tx)


def find(tx: Session, rollout_id: int) -> Rollout:
    """Read one rollout. Raises NotFound."""
    rollout = tx.get(Rollout, rollout_id)
    if rollout is None:
        raise NotFound("rollout", rollout_id)
    return rollout


def lock(tx: Session, rollout_id: int) -> Rollout:
    """Read one rollout and hold its row until the transaction ends. Raises NotFound."""
    rollout = tx.get(Rollout, rollout_id, with_for_update=True, populate_existing=True)
    if rollout is None:
        raise NotFound("rollout", rollout_id)
    return rollout


def active(tx: Session, model_id: int, fleet: Mapping[str, str]) -> Rollout | None:
    """The rollout under way of a model that could want other things of the hosts of this fleet."""
    going = select(Rollout).where(Rollout.model_id == model_id, col(Rollout.status).in_(ACTIVE_ROLLOUT))
    for rollout in tx.scalars(going.order_by(col(Rollout.id))):
        try:
            theirs = stored.labels(rollout.fleet)
        except stored.Unreadable:
            return rollout  # nobody knows which hosts it moves
        if all(theirs.get(key, value) == value for key, value in fleet.items()):
            return rollout  # a host may carry both fleets' labels
    return None


def listing(
    tx: Session, *, model: str | None = None, going: bool = False, before: int | None = None, limit: int = 100
) -> list[Rollout]:
    """Rollouts, newest first, those with an id under `before`; `going`: only those that have not ended."""
    query = select(Rollout).order_by(col(Rollout.id).desc()).limit(limit)
    if model is not None:
        query = query.join(Model).where(Model.name == model)
    if going:
        query = query.where(col(Rollout.status).in_(ACTIVE_ROLLOUT))
    if before is not None:
        query = query.where(col(Rollout.id) < before)
    return list(tx.scalars(query))


def steps(tx: Session, rollout_id: int, *, newest: int | None = None) -> list[RolloutStep]:
    """What the rollout did, in order; of many the `newest`."""
    query = select(RolloutStep).where(RolloutStep.rollout_id == rollout_id).order_by(col(RolloutStep.number).desc())
    return list(tx.scalars(query.limit(newest)))[::-1]


def move(rollout: Rollout, status: RolloutStatus, reason: str) -> None:
    """Change the status by the rules of the lifecycle. Raises IllegalTransition."""
    if status != rollout.status:
        lifecycle.check(RolloutStatus(rollout.status), status)
    rollout.status, rollout.reason = status, reason
    rollout.revision += 1


def add_step(
    tx: Session,
    rollout: Rollout,
    action: str,
    detail: Mapping[str, Any],
    *,
    observations: Mapping[str, Any] | None = None,
    actor: str = _SELF,
) -> None:
    """Record that the rollout did something, under its next step number."""
    assert rollout.id is not None
    rollout.step += 1
    tx.add(rollout)
    tx.add(
        RolloutStep(
            rollout_id=rollout.id,
            number=rollout.step,
            action=action,
            detail=dict(detail),
            observations=dict(observations or {}),
            actor=actor,
        )
    )


def next_job(tx: Session, rollout: Rollout, *, not_before: float = 0.0) -> Job | None:
    """Insert the job of the rollout's next step."""
    assert rollout.id is not None
    return jobs.insert(
        tx,
        key=f"rollout:{rollout.id}:step:{rollout.step + 1}",
        subject_type="rollout",
        subject_id=rollout.id,
        stage=Stage.ROLLOUT,
        not_before=not_before,
    )


def report(
    tx: Session,
    rollout: Rollout,
    what: str,
    *,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    actor: str = _SELF,
    reason: str = "",
) -> None:
    """Write the event `rollout.<what>`."""
    events.record(
        tx,
        f"rollout.{what}",
        model=tx.get_one(Model, rollout.model_id).name,
        version=rollout.number,
        subject=f"rollout:{rollout.id}",
        before=dict(before or {}),
        after={"status": rollout.status, "wave": rollout.wave, **(after or {})},
        actor=actor,
        reason=reason,
    )


def _version(tx: Session, model: Model, selector: int | str | None) -> Version:
    if selector is not None:
        version = versions.get(tx, model.name, selector)
    else:
        ready = select(Version).where(Version.model_id == model.id, Version.status == VersionStatus.READY)
        newest = tx.scalars(ready.order_by(*identity.newest_first()).limit(1)).one_or_none()
        if newest is None:
            raise NotFound(f"ready version of model {model.name}", "yet")
        version = newest
    if version.status != VersionStatus.READY:
        raise Conflict(f"version {version.number} of {model.name} is {version.status}: only a ready one can be served")
    return version


def _numbered(tx: Session, model_id: int, number: int) -> Version:
    return tx.scalars(select(Version).where(Version.model_id == model_id, Version.number == number)).one()


def _newest(tx: Session, model_id: int) -> Version | None:
    """The ready, proven version whose weights were written last."""
    mine = select(Version).where(Version.model_id == model_id, Version.status == VersionStatus.READY)
    mine = mine.where(col(Version.unproven).is_(False)).order_by(*identity.newest_first())
    return tx.scalars(mine.limit(1)).one_or_none()


def _is_newer(tx: Session, version: Version) -> bool:
    """Whether its weights were written after the champion's; true where nothing is served yet."""
    number = champion.number(tx, version.model_id)
    if number is None:
        return True
    serves = _numbered(tx, version.model_id, number)
    return (version.written_at, version.number) > (serves.written_at, serves.number)


def _had_rollout(tx: Session, version: Version) -> bool:
    query = select(func.count()).select_from(Rollout)
    return bool(tx.scalars(query.where(Rollout.model_id == version.model_id, Rollout.number == version.number)).one())


def _improve(
    tx: Session, version: Version, now: Serving, fleet: Mapping[str, str], policies: tuple[Policy, ...]
) -> Rollout | None:
    model = tx.get_one(Model, version.model_id)
    settings = rollout_settings.of(tx, version, policy_for(model.name, policies)).model_copy(
        update={"fleet": dict(fleet)}
    )
    if version.unproven or not settings.automatic:
        return None
    better = rollout_variants.better(tx, version, now, fleet)
    if better is None:
        return None
    try:
        return _start(tx, model, version, settings, better=(now, better), actor=_SELF, reason=better.reason)
    except Conflict:  # another transaction was faster; its end looks again
        return None


def _make_way(tx: Session, other: Rollout, version: Version) -> None:
    """Better variants that nobody approved yet do not hold up a newer version."""
    waits = other.status == _R.PENDING and other.number == other.from_number and other.request is None
    if waits and other.actor == _SELF and other.id is not None:
        decide(tx, other.id, "abort", actor=_SELF, reason=f"version {version.number} is ready")


def _start(
    tx: Session,
    model: Model,
    version: Version,
    settings: RolloutSettings,
    *,
    variant: str | None = None,
    better: tuple[Serving, Better] | None = None,
    actor: str,
    reason: str,
) -> Rollout:
    """`better`: what was served when it was found to be better, and what."""
    assert model.id is not None
    tx.get(Model, model.id, with_for_update=True)  # of two starters the second sees the first one's rollout
    if champion.slot(tx, model.id, version.number) is None:
        raise Conflict(f"version {version.number} of {model.name} has no artifact to serve")
    if (other := active(tx, model.id, settings.fleet)) is not None:
        raise Conflict(f"rollout {other.id} of {model.name} is {other.status} on fleet {other.fleet}: abort it or wait")
    now = champion.serving(tx, model.id, settings.fleet)
    if better is not None and now != better[0]:
        raise Conflict(f"fleet {champion.fleet_key(settings.fleet)} of {model.name} was moved meanwhile")
    rollout = Rollout(
        model_id=model.id,
        fleet=champion.fleet_key(settings.fleet),
        number=version.number,
        variants=better[1].variants if better is not None else _variants(tx, version, settings.fleet, variant),
        from_number=now.number if now is not None else None,
        from_variants=dict(now.variants) if now is not None else {},
        status=RolloutStatus.PENDING if settings.approval else RolloutStatus.RUNNING,
        reason="waits for approval" if settings.approval else "",
        settings=json.loads(settings.model_dump_json()),
        state={"pinned": True} if variant is not None else {},
        actor=actor,
    )
    _begin(tx, model, rollout, reason)
    return rollout


def _begin(tx: Session, model: Model, rollout: Rollout, reason: str) -> None:
    """Insert it with its first job, and say so. Raises Conflict."""
    try:
        with tx.begin_nested():
            tx.add(rollout)
            tx.flush()
    except IntegrityError as exc:
        raise Conflict(f"a rollout of {model.name} on fleet {rollout.fleet} is under way: abort it or wait") from exc
    names = {kind: entry["variant"] for kind, entry in rollout.variants.items()}
    after = {"from": rollout.from_number, "variants": names}
    report(tx, rollout, "started", after=after, actor=rollout.actor, reason=reason)
    next_job(tx, rollout)


def _variants(tx: Session, version: Version, fleet: Mapping[str, str], variant: str | None) -> Variants:
    """What a new rollout gives. Raises Conflict where the fleet has it already, or the variant is not ready."""
    kinds = champion.kinds(tx, fleet)
    if variant is None:
        wanted = rollout_variants.measured(tx, version, kinds)
    else:
        wanted = rollout_variants.by_hand(tx, version, kinds, variant)
    now = champion.finished(tx, version.model_id, fleet)
    if now is not None and now.number == version.number and not rollout_variants.differ(now, wanted, kinds):
        names = ", ".join(sorted({now.slot(kind).variant for kind in {"", *kinds}}))
        raise Conflict(f"fleet {champion.fleet_key(fleet)} serves version {version.number} already ({names})")
    return wanted
