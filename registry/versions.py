"""Versions: recorded once, judged by their jobs, opened again, put away.

Every verb takes an open transaction and never commits. Whoever commits sends the jobs that a verb returns and rings
"jobs" and "events"; what is not sent, the dispatcher finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import String, and_, cast, exists, literal, select, update
from sqlmodel import col

from weighbridge import limits
from weighbridge.registry import catalog, checkpoints, events, identity, jobs, lifecycle, recipes, stored
from weighbridge.registry.db import Session, clock
from weighbridge.registry.errors import Conflict, NotFound
from weighbridge.registry.identity import Change, Known
from weighbridge.registry.lifecycle import (
    CheckpointState,
    IllegalTransition,
    JobState,
    JobView,
    Stage,
    VariantStatus,
    Verdict,
    VersionStatus,
)
from weighbridge.registry.models import Alias, CheckpointFile, Job, Model, Recipe, Variant, Version
from weighbridge.registry.recipe import Policy
from weighbridge.registry.spelling import nearest
from weighbridge.storage.identity import weights as weights_of
from weighbridge.storage.identity import written_at
from weighbridge.storage.protocols import Ref
from weighbridge.storage.streaming import digest_bytes

_STAGES = (Stage.VALIDATE, Stage.EVALUATE)
_JUDGED = (VersionStatus.DISCOVERED, VersionStatus.READY)
"""The states in which jobs still decide."""
_NOTHING_NEW = (Change.SAME, Change.LESS)
_VARIANT = {
    VersionStatus.READY: VariantStatus.READY,
    VersionStatus.REJECTED: VariantStatus.REJECTED,
    VersionStatus.QUARANTINED: VariantStatus.FAILED,
}
"""What the original becomes with its version. The others keep it as it is."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The version of some pins, whether it is new, and the jobs to send after commit."""

    version: Version
    created: bool
    jobs: list[Job]


def record(
    tx: Session,
    *,
    model: str,
    path: str,
    files: Sequence[Ref],
    pins_digest: str,
    proof: str,
    proof_reason: str,
    recipe_text: str | None,
    policy: Policy,
    eval_pin: Ref | None,
    seen: str,
    actor: str,
    train_pin: Ref | None = None,
    unproven: bool = False,
    weights: str | None = None,
    refused: str | None = None,
) -> Recorded:
    """Record a complete checkpoint: version, files, first job, event. The same weights are the version that is there.

    `weights` is their digest where somebody read them. `refused` says why the content is wrong for good: quarantined
    at once, without a job. Raises InvalidRecipe, Invalid.
    """
    catalog.check_name(model)
    before = checkpoints.lookup(tx, model, path, lock=True)  # Of racing recorders of a path one inserts.
    as_seen = before is not None and (before.state, before.seen) == (CheckpointState.COMPLETE, seen)
    checkpoint = checkpoints.mark(
        tx, model, path, state=CheckpointState.COMPLETE, reason="", seen=seen, proof=proof, actor=actor
    )
    known = identity.current(tx, model, path, lock=True)
    if known is not None and (same := identity.compare(known, weights_of(files), weights)) in _NOTHING_NEW:
        settled = as_seen and known.version.status != VersionStatus.SUPERSEDED
        again = [] if settled or same is Change.LESS else _accompany(tx, known, files, model, actor=actor)
        return Recorded(known.version, False, again)
    row = catalog.ensure(tx, model, actor=actor)
    assert row.id is not None
    recipe = recipes.pin(tx, model, recipe_text, policy)
    version = Version(
        model_id=row.id,
        number=_next_number(tx, row.id),
        checkpoint_id=checkpoint.id,
        path=path,
        # Put again within the grain of the store's clock, after something else, it may have the pins that it had.
        pins_digest=pins_digest if known is None else digest_bytes(f"{pins_digest}:{known.version.id}".encode()),
        proof=proof,
        proof_reason=proof_reason,
        unproven=unproven,
        recipe_id=recipe.id,
        eval_pin=asdict(eval_pin) if eval_pin else None,
        train_pin=asdict(train_pin) if train_pin else None,
        facts={"weights": weights} if weights else {},
        size=sum(file.size for file in files),
        written_at=written_at(weights_of(files)) or clock(tx),
    )
    tx.add(version)
    tx.flush()
    identity.add_files(tx, version, files)
    told = {"path": path, "proof": proof, "unproven": unproven, "recipe": recipe.digest, "size": version.size}
    _tell(tx, version, model, "recorded", after=told, actor=actor, reason=proof_reason)
    if refused is not None:
        move(tx, version, model, VersionStatus.QUARANTINED, refused, actor=actor)
        return Recorded(version, True, [])
    if weights is not None and (owner := identity.having(tx, row.id, weights)) is not None:
        reason = identity.duplicate(tx, version, owner, model)
        move(tx, version, model, VersionStatus.DUPLICATE, reason, actor=actor)
        return Recorded(version, True, _roll_out(tx, version, VersionStatus.DISCOVERED, (policy,)))
    return Recorded(version, True, _insert_jobs(tx, version, (Stage.VALIDATE,)))


def _accompany(tx: Session, known: Known, files: Sequence[Ref], model: str, *, actor: str) -> list[Job]:
    """Nothing new was written; a judgement that reads pins which are no more begins anew on those that are."""
    version = known.version
    stale = identity.accompany(tx, known, files, model, actor=actor)
    if version.status == VersionStatus.SUPERSEDED:
        return reopen(tx, version, model, actor=actor, reason="the same weights lie there")
    if not stale:
        return []
    jobs.cancel(tx, "version", _id(version))
    version.judgement += 1
    version.revision += 1
    tx.flush()
    return _insert_jobs(tx, version, (Stage.VALIDATE,))


def lock(tx: Session, version_id: int) -> Version:
    """Return the version, its row locked until the transaction's end. Raises NotFound."""
    version = tx.get(Version, version_id, with_for_update={"key_share": True}, populate_existing=True)
    if version is None:
        raise NotFound("version", f"with id {version_id}")
    return version


def get(tx: Session, model: str, selector: int | str) -> Version:
    """Return a version by number (`3`, `"3"`), alias, or `latest` (written last). Raises NotFound."""
    named = select(col(Model.id)).where(col(Model.name) == model).scalar_subquery()
    statement = select(Version).where(col(Version.model_id) == named)
    if isinstance(selector, int) or (selector.isascii() and selector.isdigit()):
        statement = statement.where(col(Version.number) == min(int(selector), limits.COUNT))
    elif selector == "latest":
        statement = statement.where(col(Version.status) != VersionStatus.DUPLICATE)
        statement = statement.order_by(*identity.newest_first()).limit(1)
    else:
        pointed = and_(col(Alias.model_id) == col(Version.model_id), col(Alias.number) == col(Version.number))
        statement = statement.join(Alias, pointed).where(col(Alias.name) == selector)
    version = tx.scalars(statement).one_or_none()
    if version is None:
        raise NotFound("version", f"{model}@{selector}", _near(tx, catalog.get(tx, model), str(selector)))
    return version


def _near(tx: Session, model: Model, selector: str) -> str:
    """Of a number, the newest one; of a name, the alias that is spelled most like it."""
    if selector.isdigit():
        return f"{model.name}@{model.next_version - 1}" if model.next_version > 1 else ""
    names = tx.scalars(select(col(Alias.name)).where(col(Alias.model_id) == model.id)).all()
    found = nearest(selector, [*names, "latest"])
    return f"{model.name}@{found}" if found else ""


def advance(tx: Session, version_id: int, *, actor: str, policies: Sequence[Policy]) -> list[Job]:
    """Draw what follows from the version's jobs, under its row lock: status, event, next jobs. Return the new jobs.

    Called by whoever finished a job, in the same transaction, and by the reconcile loop: twice is as good as once.
    """
    version = lock(tx, version_id)
    old = VersionStatus(version.status)
    plan = lifecycle.plan(old, version.reason, fast=_fast(tx, version), jobs=_views(tx, version))
    if plan.status is not old:
        model = tx.get_one(Model, version.model_id)
        move(tx, version, model.name, plan.status, plan.reason, actor=actor)
    elif (reason := limits.prose(plan.reason)) != version.reason:
        version.reason = reason
        version.revision += 1
        tx.flush()
    new = _insert_jobs(tx, version, plan.jobs)
    if version.status == VersionStatus.READY and old is not VersionStatus.READY:
        new += _open_variants(tx, version, actor=actor)
    if plan.status is VersionStatus.SUPERSEDED is not old and (heir := identity.inherit(tx, version)) is not None:
        model = tx.get_one(Model, version.model_id)
        new += reopen(tx, heir, model.name, actor=actor, reason=f"the bytes of version {version.number} are lost")
    return new + _roll_out(tx, version, old, policies)


def waits(tx: Session, version_id: int, reason: str) -> None:
    """Say on a version that is being judged what its judgement waits for. Raises NotFound."""
    version = lock(tx, version_id)
    if version.status == VersionStatus.DISCOVERED and version.reason != reason:
        version.reason = reason
        version.revision += 1
        tx.flush()


def give_up(tx: Session, version_id: int, reason: str, actor: str) -> None:
    """Nobody can draw a conclusion from its rows: quarantined, with the reason, where it was not judged yet."""
    version = lock(tx, version_id)
    if version.status == VersionStatus.DISCOVERED:
        model = tx.get_one(Model, version.model_id)
        move(tx, version, model.name, VersionStatus.QUARANTINED, reason, actor=actor)
    jobs.cancel(tx, "version", version_id)


def overdue(tx: Session, limit: int = 100) -> list[int]:
    """Return ids of versions that no open job will move: their last one failed by its lease, or a `plan` was lost."""
    named = literal("version:") + cast(col(Version.id), String) + ":" + col(Job.stage)
    named = named + ":" + cast(col(Version.judgement), String)
    mine = and_(col(Job.subject_type) == "version", col(Job.subject_id) == col(Version.id), col(Job.key) == named)
    waiting = exists().where(mine, col(Job.state).in_([JobState.QUEUED, JobState.RUNNING]))
    told = exists().where(mine, col(Job.state) == JobState.SET_ASIDE)
    told = told.where(col(Version.reason).startswith(col(Job.stage) + lifecycle.UNFINISHED))
    stuck = select(col(Version.id)).where(col(Version.status) == VersionStatus.DISCOVERED, ~waiting, ~told)
    # Ready in the fast lane, and its evaluation's attempts are used up. Driven by the few failed jobs.
    failed = select(col(Version.id)).join(Job, mine).where(col(Job.state).in_([JobState.FAILED, JobState.SET_ASIDE]))
    failed = failed.where(col(Version.status) == VersionStatus.READY)
    return [row for row in tx.scalars(stuck.union(failed).limit(limit)) if row is not None]


def set_aside() -> Any:
    """The condition of versions that wait for a person, since nobody could judge them."""
    unjudged = col(Version.status) == VersionStatus.DISCOVERED
    return and_(unjudged, col(Version.reason).contains(lifecycle.UNFINISHED, autoescape=True))


def rejudge(tx: Session, model: str, number: int, *, actor: str, reason: str) -> list[Job]:
    """Judge a version anew, by the recipe and the sets that lie there when its judgement begins. Return the jobs.

    Raises NotFound, Conflict unless it ended as rejected, quarantined, needs_binding or superseded, or its job was set
    aside.
    """
    version = lock(tx, _id(get(tx, model, number)))
    if version.status == VersionStatus.READY:
        raise Conflict(
            f"version {number} of {model} is ready, by the recipe that it was judged by: a stricter one judges later "
            "versions (`archive` takes this one away), an evaluation set that it lacked is used by itself"
        )
    return reopen(tx, version, model, actor=actor, reason=reason)


def reopen(tx: Session, version: Version, model: str, *, actor: str, reason: str) -> list[Job]:
    """Begin a new judgement of a locked version; whoever validates it pins what judges it. Raises Conflict."""
    if version.status == VersionStatus.DISCOVERED:
        _restart(tx, version, model, actor=actor, reason=reason)
    else:
        move(tx, version, model, VersionStatus.DISCOVERED, "", actor=actor, why=reason)
    version.judgement += 1
    version.ready_at = None
    version.recipe_id = version.eval_pin = version.train_pin = None
    tx.flush()
    return _insert_jobs(tx, version, (Stage.VALIDATE,))


def _restart(tx: Session, version: Version, model: str, *, actor: str, reason: str) -> None:
    """Forget that its job was set aside. Raises Conflict where jobs go on."""
    if jobs.of(tx, "version", _id(version), states=[JobState.QUEUED, JobState.RUNNING]):
        raise Conflict(f"version {version.number} of {model} is being judged: wait for its verdict")
    version.reason = ""
    version.revision += 1
    _tell(tx, version, model, "reopened", actor=actor, reason=reason)


def archive(tx: Session, version: Version, model: str, *, actor: str, reason: str) -> None:
    """Put a locked version away, whatever that takes from whom (`archiving` looks first). Raises Conflict."""
    old = VersionStatus(version.status)
    move(tx, version, model, VersionStatus.ARCHIVED, reason, actor=actor)
    _roll_out(tx, version, old, ())


def judged_by(tx: Session, version: Version) -> Recipe | None:
    """The recipe revision that the version pins."""
    return tx.get(Recipe, version.recipe_id) if version.recipe_id is not None else None


def key(version: Version, stage: Stage) -> str:
    """The key of a stage's job in the version's present judgement."""
    return f"version:{version.id}:{stage}:{version.judgement}"


def files(tx: Session, version_id: int) -> list[CheckpointFile]:
    """The version's pinned files, by key."""
    mine = select(CheckpointFile).where(col(CheckpointFile.version_id) == version_id)
    return list(tx.scalars(mine.order_by(col(CheckpointFile.key))))


def _id(version: Version) -> int:
    assert version.id is not None
    return version.id


def _next_number(tx: Session, model_id: int) -> int:
    """Take the model's next number; the row lock makes the others wait until this transaction ends."""
    taken = update(Model).where(col(Model.id) == model_id).values(next_version=col(Model.next_version) + 1)
    next_one = tx.execute(
        taken.returning(col(Model.next_version)), execution_options={"synchronize_session": False}
    ).scalar_one()
    return int(next_one) - 1


def _views(tx: Session, version: Version) -> list[JobView]:
    """The jobs of the present judgement, in the words of `plan`."""
    keys = [key(version, stage) for stage in _STAGES]
    columns = (col(Job.stage), col(Job.state), col(Job.verdict), col(Job.reason))
    return [
        JobView(Stage(stage), JobState(state), Verdict(verdict) if verdict else None, reason)
        for stage, state, verdict, reason in tx.execute(select(*columns).where(col(Job.key).in_(keys)))
    ]


def _fast(tx: Session, version: Version) -> bool:
    recipe = judged_by(tx, version)
    return recipe is not None and recipe.effective.get("lane") == "fast"


def _insert_jobs(tx: Session, version: Version, stages: Sequence[Stage]) -> list[Job]:
    inserted = [
        jobs.insert(tx, key=key(version, stage), subject_type="version", subject_id=_id(version), stage=stage)
        for stage in stages
    ]
    return [job for job in inserted if job is not None]


def move(
    tx: Session, version: Version, model: str, status: VersionStatus, reason: str, *, actor: str, why: str = ""
) -> None:
    """Change the status, and with it the original variant and the jobs that nobody needs now. Raises Conflict."""
    old, was = VersionStatus(version.status), version.reason
    try:
        lifecycle.check(old, status)
    except IllegalTransition as exc:
        raise Conflict(f"version {version.number} of {model}: {exc}") from exc
    version.status, version.reason = status, reason
    version.revision += 1
    if status is VersionStatus.READY:
        version.ready_at = clock(tx)
    if status is VersionStatus.SUPERSEDED:
        version.weights = None  # nobody has them: what comes back is judged
    if status not in _JUDGED:
        jobs.cancel(tx, "version", _id(version))
    if old is VersionStatus.READY:
        _cancel_variants(tx, version)
    if status in _VARIANT:
        original = and_(col(Variant.version_id) == version.id, col(Variant.name) == "original")
        tx.execute(update(Variant).where(original).values(status=_VARIANT[status], reason=reason))
    tx.flush()
    before, after = {"status": str(old)}, {"status": str(status)}
    if status is VersionStatus.ARCHIVED:
        before |= {"reason": was}  # `unarchive` gives both back
    if version.duplicate_of is not None:
        after |= {"path": version.path, "duplicate_of": str(version.duplicate_of)}
    _tell(tx, version, model, str(status), before=before, after=after, actor=actor, reason=why or reason)


def _open_variants(tx: Session, version: Version, *, actor: str) -> list[Job]:
    # Late: variants build on versions, and this is the one way back.
    from weighbridge.registry import variants

    model = tx.get_one(Model, version.model_id)
    try:
        return variants.open_all(tx, version, variants.wishes(tx, version), model.name, actor=actor)
    except stored.Unreadable as exc:
        _note_held(tx, version, str(exc))
        return []


def _cancel_variants(tx: Session, version: Version) -> None:
    from weighbridge.registry import variants

    variants.cancel(tx, _id(version))


def _roll_out(tx: Session, version: Version, old: VersionStatus, policies: Sequence[Policy]) -> list[Job]:
    """What a new status means for the fleets."""
    # Late: rollouts build on versions, and this is the one way back.
    from weighbridge.registry import rollouts

    if version.status == VersionStatus.READY and old is not VersionStatus.READY:
        try:
            rollout = rollouts.start_automatic(tx, version.model_id, tuple(policies))
            why = rollouts.held(tx, version, tuple(policies)) if rollout is None else None
        except stored.Unreadable as exc:
            rollout, why = None, f"it does not roll out by itself: {exc}"
        if rollout is not None and rollout.id is not None:
            return jobs.of(tx, "rollout", rollout.id, states=[JobState.QUEUED])
        if why is not None:
            _note_held(tx, version, why)
    elif version.status == VersionStatus.DUPLICATE and old is not VersionStatus.DUPLICATE:
        rollout = rollouts.start_again(tx, version, tuple(policies))
        if rollout is not None and rollout.id is not None:
            return jobs.of(tx, "rollout", rollout.id, states=[JobState.QUEUED])
    elif old is VersionStatus.READY and version.status != VersionStatus.READY:
        rollouts.withdraw(tx, version, version.reason)
    return []


def _note_held(tx: Session, version: Version, why: str) -> None:
    version.facts = {**version.facts, "held": why}
    _tell(tx, version, tx.get_one(Model, version.model_id).name, "held", actor="weighbridge", reason=why)


def _tell(tx: Session, version: Version, model: str, what: str, **told: Any) -> None:
    events.record(tx, f"version.{what}", model=model, version=version.number, subject=f"version:{version.id}", **told)
