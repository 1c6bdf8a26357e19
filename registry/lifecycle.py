"""What a version, a variant, a job and a rollout can be, and what follows from what.

`TRANSITIONS` is code and documentation at once: every change of status goes through `check`. `plan` is pure: the worker
that finishes a job and the daemon's reconcile loop run the same one, under the subject's row lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class VersionStatus(StrEnum):
    DISCOVERED = "discovered"
    """Recorded; its jobs decide. One whose job was set aside stays so, with the reason: `rejudge` begins anew."""
    READY = "ready"
    """The original passed every blocking gate: it may be served."""
    REJECTED = "rejected"
    """Sound, but it failed a gate (or holds non-finite values)."""
    QUARANTINED = "quarantined"
    """Hostile, corrupt, or not provably safe."""
    NEEDS_BINDING = "needs_binding"
    """Sound tensors, but no single program that they belong to."""
    SUPERSEDED = "superseded"
    """Its bytes changed in the bucket before they were safe in the artifact store."""
    ARCHIVED = "archived"
    """Put away by a person; no host is given it until they bring it back."""
    DUPLICATE = "duplicate"
    """The same weights as another version of the model, which is the one that is judged and served."""


class VariantStatus(StrEnum):
    PENDING = "pending"
    READY = "ready"
    FAILED = "failed"
    NOT_APPLICABLE = "not_applicable"
    REJECTED = "rejected"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """Its attempts are used up; `plan` fails closed."""
    SET_ASIDE = "set_aside"
    """It ended the workers that tried, or this installation cannot do it: nothing is known of its subject, which stays
    as it is until somebody has it judged anew."""
    CANCELLED = "cancelled"
    """Nobody needs its outcome any more (its rollout ended, its subject was archived)."""


class RolloutStatus(StrEnum):
    PENDING = "pending"
    """Waits for a person's approval."""
    RUNNING = "running"
    HOLDING = "holding"
    """Cannot go on by itself; `reason` says what is missing. It goes on when that is there."""
    PAUSED = "paused"
    """A person stopped it; only a person lets it go on."""
    ROLLING_BACK = "rolling_back"
    FINISHED = "finished"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"
    """Ended before it assigned anything."""


class CheckpointState(StrEnum):
    WAITING = "waiting"
    """Not complete, or its recipe is invalid; `reason` says which and what to do."""
    COMPLETE = "complete"
    """Recorded as a version."""
    REFUSED = "refused"
    """Will never become a version as it is (unsupported format, bad name)."""


class Stage(StrEnum):
    VALIDATE = "validate"
    EVALUATE = "evaluate"
    """Of a version: its original. Of a variant: against the original, on the same inputs."""
    COMPRESS = "compress"
    """Build a variant, or one shard of it (the job's `part`)."""
    ASSEMBLE = "assemble"
    """Join the shards of a variant into its artifact."""
    BENCHMARK = "benchmark"
    """Measure a variant on one kind of device (the job's `part`)."""
    ROLLOUT = "rollout"
    """One recorded step of a rollout."""


class Verdict(StrEnum):
    PASSED = "passed"
    REJECTED = "rejected"
    QUARANTINED = "quarantined"
    NEEDS_BINDING = "needs_binding"
    SUPERSEDED = "superseded"
    DUPLICATE = "duplicate"
    NOT_APPLICABLE = "not_applicable"
    NOISY = "noisy"
    """The machine was too busy to compare anything in time: kept as invalid, never a fact, and run again some times."""


QUEUES: Mapping[Stage, str] = MappingProxyType(
    {
        Stage.VALIDATE: "cpu",
        Stage.EVALUATE: "cpu",
        Stage.COMPRESS: "variants",
        Stage.ASSEMBLE: "variants",
        Stage.BENCHMARK: "variants",
        Stage.ROLLOUT: "control",
    }
)
"""Where a stage runs when its job names no other queue. `variants` is apart from `cpu`, so that a new checkpoint never
waits behind a compression; jobs that need CUDA go to `gpu`, benchmarks to the queue of their kind (`kind_queue`)."""


def kind_queue(kind: str) -> str:
    """The queue of the workers of one kind of device: where its benchmarks go."""
    return f"kind.{kind}"


V, S, R = VersionStatus, VariantStatus, RolloutStatus
TRANSITIONS: Mapping[StrEnum, frozenset[StrEnum]] = MappingProxyType(
    {
        V.DISCOVERED: frozenset({V.READY, V.REJECTED, V.QUARANTINED, V.NEEDS_BINDING, V.SUPERSEDED, V.DUPLICATE}),
        # A fast-lane version is evaluated after it became ready, and may fail then.
        V.READY: frozenset({V.REJECTED, V.QUARANTINED, V.ARCHIVED}),
        # `rejudge` opens these again; so does what they lacked (judging.need), and a new template for needs_binding.
        V.REJECTED: frozenset({V.DISCOVERED, V.ARCHIVED}),
        V.QUARANTINED: frozenset({V.DISCOVERED, V.ARCHIVED}),
        V.NEEDS_BINDING: frozenset({V.DISCOVERED, V.ARCHIVED}),
        # Its weights proved to lie there as they did: only their dates, or what is beside them, had changed.
        V.SUPERSEDED: frozenset({V.DISCOVERED, V.ARCHIVED}),
        # `unarchive` gives back what it was.
        V.ARCHIVED: frozenset({V.READY, V.REJECTED, V.QUARANTINED, V.NEEDS_BINDING, V.SUPERSEDED}),
        # Its owner's bytes are lost, and these are the same.
        V.DUPLICATE: frozenset({V.DISCOVERED}),
        R.PENDING: frozenset({R.RUNNING, R.ABORTED}),
        R.RUNNING: frozenset({R.HOLDING, R.PAUSED, R.ROLLING_BACK, R.FINISHED, R.ABORTED}),
        R.HOLDING: frozenset({R.RUNNING, R.PAUSED, R.ROLLING_BACK, R.FINISHED, R.ABORTED}),
        R.PAUSED: frozenset({R.RUNNING, R.ROLLING_BACK, R.ABORTED}),
        R.ROLLING_BACK: frozenset({R.ROLLED_BACK}),
        R.FINISHED: frozenset(),
        R.ROLLED_BACK: frozenset(),
        R.ABORTED: frozenset(),
    }
)

VARIANT_TRANSITIONS: Mapping[StrEnum, frozenset[StrEnum]] = MappingProxyType(
    {
        S.PENDING: frozenset({S.READY, S.FAILED, S.NOT_APPLICABLE, S.REJECTED}),
        # A new judgement of the version builds and judges its variants again.
        S.READY: frozenset({S.PENDING, S.REJECTED, S.FAILED}),
        S.FAILED: frozenset({S.PENDING}),
        S.NOT_APPLICABLE: frozenset({S.PENDING}),
        S.REJECTED: frozenset({S.PENDING}),
    }
)
"""Apart from `TRANSITIONS`: a variant's `ready` and a version's are equal strings, and would be one key."""

ACTIVE_ROLLOUT = (R.PENDING, R.RUNNING, R.HOLDING, R.PAUSED, R.ROLLING_BACK)
"""At most one of these per (model, fleet): a partial unique index holds it."""


class IllegalTransition(ValueError):
    """The status cannot change like that; `old` and `new` are on the error."""

    def __init__(self, old: StrEnum, new: StrEnum) -> None:
        allowed = " or ".join(sorted(_allowed(old)))
        rest = f"it may become {allowed}" if allowed else "nothing follows"
        super().__init__(f"it is {old}, which cannot become {new}: {rest}")
        self.old, self.new = old, new


def check(old: StrEnum, new: StrEnum) -> None:
    """Raise IllegalTransition unless the table of its kind allows old → new."""
    if new not in _allowed(old):
        raise IllegalTransition(old, new)


def _allowed(old: StrEnum) -> frozenset[StrEnum]:
    return (VARIANT_TRANSITIONS if isinstance(old, VariantStatus) else TRANSITIONS)[old]


@dataclass(frozen=True, slots=True)
class JobView:
    """What `plan` needs of a job of the version's current judgement."""

    stage: Stage
    state: JobState
    verdict: Verdict | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """The status that follows (the present one, when nothing changes), why, and the jobs to insert."""

    status: VersionStatus
    reason: str
    jobs: tuple[Stage, ...] = ()


_VERDICT_STATUS = {
    Verdict.REJECTED: V.REJECTED,
    Verdict.QUARANTINED: V.QUARANTINED,
    Verdict.NEEDS_BINDING: V.NEEDS_BINDING,
    Verdict.SUPERSEDED: V.SUPERSEDED,
    Verdict.DUPLICATE: V.DUPLICATE,
}


def plan(status: VersionStatus, reason: str, *, fast: bool, jobs: Sequence[JobView]) -> Plan:
    """Name a version's next status and jobs from its jobs alone. Pure.

    `fast` is the fast lane: ready after validation, evaluation runs behind the rollout and can still reject.
    """
    by_stage = {job.stage: job for job in jobs}
    stay = Plan(status, reason)
    if status not in (V.DISCOVERED, V.READY):
        return stay
    validate = by_stage.get(Stage.VALIDATE)
    if validate is None:
        return Plan(status, reason, (Stage.VALIDATE,))
    if (ended := _ended(validate, status)) is not None:
        return ended
    if validate.state is not JobState.DONE:
        return stay
    evaluate = by_stage.get(Stage.EVALUATE)
    if evaluate is None:
        return Plan(V.READY if fast else status, validate.reason, (Stage.EVALUATE,))
    if (ended := _ended(evaluate, status)) is not None:
        return ended
    if evaluate.state is JobState.DONE:
        return Plan(V.READY, evaluate.reason)
    return Plan(V.READY, validate.reason) if fast else stay


def _ended(job: JobView, status: VersionStatus) -> Plan | None:
    """The end that a job brings, if it does: a verdict, or attempts used up (which fails closed).

    One that was set aside says nothing of a checkpoint, which waits; but what is served on the promise of an evaluation
    that nobody could make is served no longer.
    """
    if job.state is JobState.SET_ASIDE and status is V.DISCOVERED:
        return Plan(status, unfinished(job.stage, job.reason))
    if job.state in (JobState.FAILED, JobState.SET_ASIDE):
        ended = V.QUARANTINED if job.stage is Stage.VALIDATE else V.REJECTED
        return Plan(ended, unfinished(job.stage, job.reason))
    if job.state is JobState.DONE and job.verdict in _VERDICT_STATUS:
        return Plan(_VERDICT_STATUS[job.verdict], job.reason)
    return None


UNFINISHED = " did not finish: "


def unfinished(stage: Stage, reason: str) -> str:
    """What a subject says whose job ended without a verdict."""
    return f"{stage}{UNFINISHED}{reason}"


@dataclass(frozen=True, slots=True)
class VariantJob:
    """What `plan_variant` needs of a job of the variant's current judgement."""

    stage: Stage
    part: str
    """A shard's number for COMPRESS (empty: the whole), a kind of device for BENCHMARK; else empty."""
    state: JobState
    verdict: Verdict | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """The status that follows, why, and the jobs to insert as (stage, part)."""

    status: VariantStatus
    reason: str
    jobs: tuple[tuple[Stage, str], ...] = ()


def plan_variant(
    status: VariantStatus,
    reason: str,
    *,
    jobs: Sequence[VariantJob],
    shards: int = 1,
    kinds: Sequence[str] = (),
) -> VariantPlan:
    """Name a variant's next status and jobs from its jobs alone. Pure.

    `shards` above 1: compress them side by side and assemble. `kinds`: the kinds of device to measure it on once it is
    ready; a benchmark never changes the status. The original is ready when its version is, and is only measured.
    """
    if status is S.PENDING:
        return _build(reason, jobs, shards)
    if status is S.READY:
        for job in jobs:  # evaluated again, on a set that was not there
            if job.stage is Stage.EVALUATE and (ended := _variant_ended(job)) is not None:
                return ended
        there = {job.part for job in jobs if job.stage is Stage.BENCHMARK}
        return VariantPlan(status, reason, tuple((Stage.BENCHMARK, kind) for kind in kinds if kind not in there))
    return VariantPlan(status, reason)


def _build(reason: str, jobs: Sequence[VariantJob], shards: int) -> VariantPlan:
    """Compress, assemble what was sharded, evaluate: the next of these, or the end that one of them brought."""
    parts = [str(number) for number in range(shards)] if shards > 1 else [""]
    steps = [[(Stage.COMPRESS, part) for part in parts]]
    steps += [[(Stage.ASSEMBLE, "")]] if shards > 1 else []
    steps += [[(Stage.EVALUATE, "")]]
    by_key = {(job.stage, job.part): job for job in jobs}
    for step in steps:
        found = [by_key[key] for key in step if key in by_key]
        for job in found:
            if (ended := _variant_ended(job)) is not None:
                return ended
        if missing := tuple(key for key in step if key not in by_key):
            return VariantPlan(S.PENDING, reason, missing)
        if any(job.state is not JobState.DONE for job in found):
            return VariantPlan(S.PENDING, reason)
        reason = found[-1].reason
    return VariantPlan(S.READY, reason)


def _variant_ended(job: VariantJob) -> VariantPlan | None:
    """What cannot be measured is no pass: an evaluation that is not applicable fails closed too."""
    if job.state in (JobState.FAILED, JobState.SET_ASIDE):
        return VariantPlan(S.FAILED, unfinished(job.stage, job.reason))
    if job.state is not JobState.DONE or job.verdict is Verdict.PASSED:
        return None
    if job.verdict is Verdict.NOT_APPLICABLE:
        return VariantPlan(S.NOT_APPLICABLE, job.reason)
    return VariantPlan(S.REJECTED if job.stage is Stage.EVALUATE else S.FAILED, job.reason)
