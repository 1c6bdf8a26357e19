"""Variants: opened when their version is ready, moved by their jobs, each for itself; none ever holds its version back.

Every verb takes an open transaction and never commits; locks go version, variant, jobs. Whoever commits sends the jobs
that a verb returns; what is not sent, the dispatcher finds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import String, and_, cast, exists, func, literal, or_, select
from sqlalchemy.orm import aliased
from sqlmodel import col

from weighbridge.registry import artifacts, events, identity, jobs, lifecycle, stored, versions, workers_seen
from weighbridge.registry.db import Session, clock, insert_into, insert_or_skip
from weighbridge.registry.errors import Conflict, NotFound
from weighbridge.registry.lifecycle import (
    QUEUES,
    JobState,
    Stage,
    VariantJob,
    VariantPlan,
    VariantStatus,
    Verdict,
    VersionStatus,
    kind_queue,
)
from weighbridge.registry.models import Alias, Job, Model, Recipe, Variant, VariantTensor, Version
from weighbridge.registry.recipe import NEEDS_CUDA, STREAMED, Policy, VariantWish
from weighbridge.registry.recipe import Recipe as Wishes
from weighbridge.registry.schemas import VariantTensor as WireTensor
from weighbridge.storage import names

ORIGINAL = "original"
_OPEN = (JobState.QUEUED, JobState.RUNNING)
BENCHMARK_TRIES = 4
"""Of what a busy machine could not show: by themselves; a person may ask for more (`measure_again`)."""
_MEMORY = 3
"""Times the checkpoint's bytes: what a method that does not stream holds of the original, the variant and its work."""


def open_all(tx: Session, version: Version, recipe: Wishes, model_name: str, *, actor: str) -> list[Job]:
    """A locked version became ready: open its variants, anew after another judgement. Return their first jobs."""
    rows = {row.name: row for row in listing(tx, _id(version))}
    wished = {wish.name: wish for wish in recipe.variants}
    for name, row in rows.items():
        if name != ORIGINAL and name not in wished:
            _retire(tx, version, row, model_name, actor=actor)
    opened = [_open(tx, version, wish, rows.get(wish.name)) for wish in recipe.variants]
    new = [job for row in opened for job in _advance(tx, version, row, (), model_name, actor=actor)]
    return new + _measure(tx, version, recipe, model_name, actor=actor)


def lock(tx: Session, variant_id: int) -> tuple[Version, Variant]:
    """Return the version and the variant, both rows locked until the transaction's end. Raises NotFound."""
    version_id = tx.scalars(select(col(Variant.version_id)).where(col(Variant.id) == variant_id)).one_or_none()
    if version_id is None:
        raise NotFound("variant", f"with id {variant_id}")
    version = versions.lock(tx, version_id)
    variant = tx.get_one(Variant, variant_id, with_for_update={"key_share": True}, populate_existing=True)
    return version, variant


def advance(tx: Session, variant_id: int, *, actor: str, policies: Sequence[Policy] = ()) -> list[Job]:
    """Draw what follows from the variant's jobs, under both rows' locks: status, event, next jobs. Return the new jobs.

    Nothing follows while its version is not ready. Twice is as good as once. Raises NotFound.
    """
    version, variant = lock(tx, variant_id)
    model = tx.get_one(Model, version.model_id)
    try:
        recipe = wishes(tx, version)
        new = _advance(tx, version, variant, (), model.name, actor=actor)
        new += _measure(tx, version, recipe, model.name, actor=actor)
    except stored.Unreadable as exc:
        if variant.status == VariantStatus.PENDING:
            _move(tx, version, variant, VariantPlan(VariantStatus.FAILED, str(exc)), model.name, actor=actor)
        return []
    return new or _improve(tx, version, tuple(policies))


def give_up(tx: Session, variant_id: int, reason: str, actor: str) -> None:
    """Nobody can draw a conclusion from its rows: failed, with the reason, where it was pending."""
    version, variant = lock(tx, variant_id)
    if variant.status == VariantStatus.PENDING:
        model = tx.get_one(Model, version.model_id)
        _move(tx, version, variant, VariantPlan(VariantStatus.FAILED, reason), model.name, actor=actor)


def wishes(tx: Session, version: Version) -> Wishes:
    """The effective recipe that the version pins. Raises Unreadable."""
    row = versions.judged_by(tx, version)
    what = f"the recipe of version {version.number}"
    return stored.parse(Wishes, row.effective, what) if row is not None else Wishes()


def listing(tx: Session, version_id: int) -> list[Variant]:
    """The version's variants, the original first."""
    mine = select(Variant).where(col(Variant.version_id) == version_id).order_by(col(Variant.id))
    return list(tx.scalars(mine, execution_options={"populate_existing": True}))


def get(tx: Session, version_id: int, name: str) -> Variant:
    """Raises NotFound."""
    rows = {row.name: row for row in listing(tx, version_id)}
    if name not in rows:
        raise artifacts.no_variant(tx, version_id, name)
    return rows[name]


def shards(version: Version, wish: VariantWish) -> int:
    """How many jobs compress the variant side by side: one for every file of weights, where the method streams."""
    if wish.method not in STREAMED:
        return 1
    return max(1, sum(names.is_weights(file["path"]) for file in version.facts.get("files", ())))


def record_tensors(tx: Session, variant_id: int, rows: Sequence[WireTensor], judgement: int) -> None:
    """Write what became of these tensors, in place of what an earlier attempt wrote of them."""
    if not rows:
        return
    insert = insert_into(tx, VariantTensor)
    keys = ("variant_id", "judgement", "name")
    taken = {name: insert.excluded[name] for name in WireTensor.model_fields if name not in keys}
    statement = insert.on_conflict_do_update(index_elements=keys, set_=taken)
    tx.execute(statement, [{"variant_id": variant_id, "judgement": judgement, **row.model_dump()} for row in rows])


def tensors(
    tx: Session, variant_id: int, judgement: int, *, after: str = "", limit: int | None = None
) -> list[VariantTensor]:
    """What became of every tensor, by name, from behind `after`."""
    mine = (col(VariantTensor.variant_id) == variant_id, col(VariantTensor.judgement) == judgement)
    named = select(VariantTensor).where(*mine, col(VariantTensor.name) > after).order_by(col(VariantTensor.name))
    return list(tx.scalars(named.limit(limit)))


def jobs_of(tx: Session, version_id: int) -> dict[str, list[Job]]:
    """The jobs of every variant of a version, by the variant's name, oldest first."""
    rows = {_id(row): row.name for row in listing(tx, version_id)}
    found: dict[str, list[Job]] = {}
    for job in tx.scalars(_jobs(rows).order_by(col(Job.id)), execution_options={"populate_existing": True}):
        found.setdefault(rows[job.subject_id], []).append(job)
    return found


def evaluations(tx: Session, version: Version, status: VariantStatus) -> list[Job]:
    """The ended evaluations of the version's variants of this status, in its present judgement."""
    ids = [_id(row) for row in listing(tx, _id(version)) if row.status == status]
    ended = _jobs(ids).where(col(Job.stage) == Stage.EVALUATE, col(Job.state) == JobState.DONE)
    return list(tx.scalars(ended.where(col(Job.key).endswith(f":{version.judgement}")).order_by(col(Job.id))))


def settled(tx: Session, version_id: int) -> bool:
    """Whether nothing is to come: no variant is pending, none of their jobs is queued or running.

    A benchmark that waits for a kind of worker that is not there does not count: it may wait for ever. Nor does one
    that was tried, and waits for its next try: what it did measure is enough to choose by.
    """
    rows = listing(tx, version_id)
    if any(row.status == VariantStatus.PENDING for row in rows if row.name != ORIGINAL):
        return False
    still = list(tx.scalars(_jobs([_id(row) for row in rows]).where(col(Job.state).in_(_OPEN))))
    kinds = workers_seen.kinds(tx) if still else {}
    now = clock(tx)
    return not any(_to_come(job, kinds, now) for job in still)


def _to_come(job: Job, kinds: Collection[str], now: float) -> bool:
    if job.state == JobState.RUNNING or job.stage != Stage.BENCHMARK:
        return True
    waits = job.attempt > 0 and job.not_before > now
    return job.part in kinds and not waits


def measure_again(tx: Session, version_id: int, name: str | None = None) -> list[Job]:
    """Make the benchmarks of a version's variants, or of one of them, due now, measured or not; return these jobs.

    One that runs goes on and is returned too. Raises NotFound where there is no such variant, Conflict where nothing is
    measured: no worker of a kind that hosts have was there yet, or the recipe says not to.
    """
    rows = [get(tx, version_id, name)] if name is not None else listing(tx, version_id)
    version = versions.lock(tx, version_id)
    mine = _jobs([_id(row) for row in rows]).where(col(Job.stage) == Stage.BENCHMARK)
    found = list(tx.scalars(mine.where(col(Job.key).endswith(f":{version.judgement}")).order_by(col(Job.id))))
    if not found or version.status != VersionStatus.READY:
        raise Conflict(
            f"version {version.number} has no benchmarks to run again: they come when it is ready, its variants are "
            "built, and a worker of a kind that hosts have is there (`weighbridge workers`)"
        )
    return [jobs.again(tx, _id(job), BENCHMARK_TRIES) for job in found]


def _jobs(variant_ids: Collection[int]) -> Any:
    """By ids: a join would have the planner read every job of every variant."""
    return select(Job).where(col(Job.subject_type) == "variant", col(Job.subject_id).in_(variant_ids))


def cancel(tx: Session, version_id: int) -> int:
    """The version is not ready any more: end the jobs of its variants; return how many."""
    return sum(jobs.cancel(tx, "variant", row.id) for row in listing(tx, version_id) if row.id is not None)


def resume(tx: Session, version: Version) -> list[Job]:
    """The version is ready once more, by the judgement that it had: go on with what `cancel` ended."""
    mine = _jobs([_id(row) for row in listing(tx, _id(version))]).where(col(Job.state) == JobState.CANCELLED)
    ended = tx.scalars(mine.where(col(Job.key).endswith(f":{version.judgement}")).order_by(col(Job.id))).all()
    return [jobs.again(tx, _id(job), job.max_attempts) for job in ended]


def overdue(tx: Session, limit: int = 100) -> list[int]:
    """Return ids of variants of ready versions that no open job will move, and of those to measure on a new kind.

    Measured late is only what may be served next: the newest ready version of a model, and those that an alias names.
    """
    ready = and_(col(Version.id) == col(Variant.version_id), col(Version.status) == VersionStatus.READY)
    waiting = exists().where(_mine(), col(Job.state).in_(_OPEN), col(Job.key).endswith(_judgement()))
    stuck = select(col(Variant.id)).join(Version, ready).where(col(Variant.status) == VariantStatus.PENDING)
    found = stuck.where(col(Variant.name) != ORIGINAL, ~waiting)
    if kinds := workers_seen.measured_kinds(tx):
        return [row for row in tx.scalars(found.union(_unmeasured(ready, kinds)).limit(limit)) if row is not None]
    return [row for row in tx.scalars(found.limit(limit)) if row is not None]


def _unmeasured(ready: Any, kinds: Sequence[str]) -> Any:
    """The ready variants that a live kind of worker has no job for, of versions that are measured and matter."""
    key = literal("variant:") + cast(col(Variant.id), String) + f":{Stage.BENCHMARK}:"
    missing = [~exists().where(col(Job.key) == key + kind + _judgement()) for kind in kinds]
    newest = identity.newest(col(Version.status) == VersionStatus.READY)
    pointed = and_(col(Alias.model_id) == col(Version.model_id), col(Alias.number) == col(Version.number))
    matter = select(newest.c.id).union(select(col(Version.id)).join(Alias, pointed))
    built = aliased(Variant)
    pending = exists().where(col(built.version_id) == Version.id, col(built.status) == VariantStatus.PENDING)
    measured = func.coalesce(
        col(Recipe.effective)["benchmark"].as_boolean(), func.json_array_length(col(Recipe.effective)["variants"]) > 0
    )
    return (
        select(col(Variant.id))
        .join(Version, ready)
        .join(Recipe, col(Recipe.id) == col(Version.recipe_id))
        .where(
            col(Variant.status) == VariantStatus.READY, col(Version.id).in_(matter), measured, ~pending, or_(*missing)
        )
    )


def _mine() -> Any:
    return and_(col(Job.subject_type) == "variant", col(Job.subject_id) == col(Variant.id))


def _judgement() -> Any:
    """How the keys of the present judgement's jobs end."""
    return literal(":") + cast(col(Version.judgement), String)


def _id(row: Version | Variant | Job) -> int:
    assert row.id is not None
    return row.id


def _improve(tx: Session, version: Version, policies: tuple[Policy, ...]) -> list[Job]:
    """When nothing more is to come, fleets that serve this version may get better variants of it."""
    # Late: rollouts choose among variants, and this is the one way back.
    from weighbridge.registry import rollouts

    if version.status != VersionStatus.READY or not settled(tx, _id(version)):
        return []
    rollout = rollouts.improve(tx, version.model_id, policies)
    return jobs.of(tx, "rollout", rollout.id, states=[JobState.QUEUED]) if rollout and rollout.id is not None else []


def _measure(tx: Session, version: Version, recipe: Wishes, model: str, *, actor: str) -> list[Job]:
    """The benchmarks of all that is ready, once nothing is built any more: building would spoil them."""
    rows = listing(tx, _id(version))
    if not recipe.measured or any(row.status == VariantStatus.PENDING for row in rows if row.name != ORIGINAL):
        return []
    kinds = workers_seen.measured_kinds(tx)
    return [job for row in rows for job in _advance(tx, version, row, kinds, model, actor=actor)]


def _open(tx: Session, version: Version, wish: VariantWish, row: Variant | None) -> Variant:
    """The variant's row, pending, with nothing of an earlier judgement."""
    said = wish.model_dump(mode="json")
    if row is None:
        fresh = insert_or_skip(tx, Variant(version_id=_id(version), name=wish.name, wish=said))
        assert fresh is not None, "the version is locked"
        return fresh
    if row.status != VariantStatus.PENDING:
        lifecycle.check(VariantStatus(row.status), VariantStatus.PENDING)
    row.status, row.reason, row.wish, row.facts = VariantStatus.PENDING, "", said, {}
    row.artifact_digest, row.size = None, 0
    tx.flush()
    return row


def _retire(tx: Session, version: Version, row: Variant, model: str, *, actor: str) -> None:
    """A variant of an earlier judgement that the present recipe does not ask for."""
    if row.status != VariantStatus.NOT_APPLICABLE:
        row.status = VariantStatus.PENDING
        reason = "the recipe that judges the version now does not ask for it"
        _move(tx, version, row, VariantPlan(VariantStatus.NOT_APPLICABLE, reason), model, actor=actor)


def _advance(
    tx: Session, version: Version, variant: Variant, kinds: Sequence[str], model: str, *, actor: str
) -> list[Job]:
    status = VariantStatus(variant.status)
    if version.status != VersionStatus.READY or (variant.name == ORIGINAL and status is not VariantStatus.READY):
        return []
    wish = stored.parse(VariantWish, variant.wish, f"the wish of variant {variant.name}") if variant.wish else None
    views = _views(tx, version, variant)
    count = shards(version, wish) if wish else 1
    plan = lifecycle.plan_variant(status, variant.reason, jobs=views, shards=count, kinds=kinds)
    _move(tx, version, variant, plan, model, actor=actor)
    if plan.status is VariantStatus.READY and plan.status is not status:
        plan = lifecycle.plan_variant(plan.status, plan.reason, jobs=views, kinds=kinds)
    return _insert_jobs(tx, version, variant, wish, plan.jobs)


def _views(tx: Session, version: Version, variant: Variant) -> list[VariantJob]:
    """The jobs of the present judgement, in the words of `plan_variant`."""
    columns = (col(Job.stage), col(Job.part), col(Job.state), col(Job.verdict), col(Job.reason))
    mine = (col(Job.subject_type) == "variant", col(Job.subject_id) == variant.id)
    statement = select(*columns).where(*mine, col(Job.key).endswith(f":{version.judgement}"))
    return [
        VariantJob(Stage(stage), part, JobState(state), Verdict(verdict) if verdict else None, reason)
        for stage, part, state, verdict, reason in tx.execute(statement.order_by(col(Job.id)))
    ]


def _move(tx: Session, version: Version, variant: Variant, plan: VariantPlan, model: str, *, actor: str) -> None:
    """Change the status and say so; a reason alone is only noted."""
    old = VariantStatus(variant.status)
    variant.reason = plan.reason
    if plan.status is not old:
        lifecycle.check(old, plan.status)
        variant.status = plan.status
        events.record(
            tx,
            f"variant.{plan.status}",
            model=model,
            version=version.number,
            subject=f"variant:{variant.id}",
            before={"status": str(old)},
            after={"name": variant.name, "status": str(plan.status), "artifact": variant.artifact_digest},
            actor=actor,
            reason=plan.reason,
        )
    tx.add(variant)
    tx.flush()


def _insert_jobs(
    tx: Session, version: Version, variant: Variant, wish: VariantWish | None, wanted: Sequence[tuple[Stage, str]]
) -> list[Job]:
    inserted = []
    for stage, part in wanted:
        queue, needs = _place(tx, version, wish, stage, part)
        inserted.append(
            jobs.insert(
                tx,
                key=f"variant:{variant.id}:{stage}:{part}:{version.judgement}",
                subject_type="variant",
                subject_id=_id(variant),
                stage=stage,
                part=part,
                queue=queue,
                needs=needs,
                max_attempts=BENCHMARK_TRIES if stage is Stage.BENCHMARK else 3,
            )
        )
    return [job for job in inserted if job is not None]


def _place(
    tx: Session, version: Version, wish: VariantWish | None, stage: Stage, part: str
) -> tuple[str, Mapping[str, Any]]:
    """Where a job goes, and what it needs: for building and comparing only what a live worker has.

    Else it would wait for ever; so a worker without it says that the variant is not applicable, or that it failed.
    """
    if stage is Stage.BENCHMARK:
        return kind_queue(part), {"kind": part}
    assert wish is not None, "the original is only measured"
    cuda = {"device": "cuda"}
    if wish.method in NEEDS_CUDA and workers_seen.can(tx, cuda, workers_seen.GPU):
        return workers_seen.GPU, cuda
    queue = QUEUES[Stage.COMPRESS]
    flat = wish.method in STREAMED and stage is Stage.COMPRESS
    memory = {} if flat else {"memory": _MEMORY * version.size}
    return queue, memory if workers_seen.can(tx, memory, queue) else {}
