"""What follows from what: the plan as a table, and the transitions as rules."""

from __future__ import annotations

import pytest

from weighbridge.registry import lifecycle
from weighbridge.registry.lifecycle import (
    TRANSITIONS,
    VARIANT_TRANSITIONS,
    IllegalTransition,
    JobState,
    JobView,
    Plan,
    RolloutStatus,
    Stage,
    VariantJob,
    VariantPlan,
    VariantStatus,
    Verdict,
    VersionStatus,
    plan,
    plan_variant,
)

V, S = VersionStatus, Stage
WAITS = Plan(V.DISCOVERED, "")


def job(stage: Stage, outcome: JobState | Verdict) -> JobView:
    """A job that is in this state, or done with this verdict; its reason says its stage."""
    if isinstance(outcome, Verdict):
        return JobView(stage, JobState.DONE, outcome, f"{stage} says")
    return JobView(stage, outcome, None, f"{stage} error")


QUEUED, RUNNING, FAILED, PASSED = JobState.QUEUED, JobState.RUNNING, JobState.FAILED, Verdict.PASSED
ASIDE = JobState.SET_ASIDE

TABLE = [
    # status, fast lane, validate, evaluate → plan
    (V.DISCOVERED, False, None, None, Plan(V.DISCOVERED, "", (S.VALIDATE,))),
    (V.DISCOVERED, True, None, None, Plan(V.DISCOVERED, "", (S.VALIDATE,))),
    (V.DISCOVERED, False, QUEUED, None, WAITS),
    (V.DISCOVERED, False, RUNNING, None, WAITS),
    (V.DISCOVERED, True, RUNNING, None, WAITS),
    (V.DISCOVERED, False, JobState.CANCELLED, None, WAITS),
    (V.DISCOVERED, False, PASSED, None, Plan(V.DISCOVERED, "validate says", (S.EVALUATE,))),
    (V.DISCOVERED, True, PASSED, None, Plan(V.READY, "validate says", (S.EVALUATE,))),
    (V.DISCOVERED, False, Verdict.REJECTED, None, Plan(V.REJECTED, "validate says")),
    (V.DISCOVERED, True, Verdict.REJECTED, None, Plan(V.REJECTED, "validate says")),
    (V.DISCOVERED, False, Verdict.QUARANTINED, None, Plan(V.QUARANTINED, "validate says")),
    (V.DISCOVERED, False, Verdict.NEEDS_BINDING, None, Plan(V.NEEDS_BINDING, "validate says")),
    (V.DISCOVERED, False, Verdict.SUPERSEDED, None, Plan(V.SUPERSEDED, "validate says")),
    (V.DISCOVERED, False, FAILED, None, Plan(V.QUARANTINED, "validate did not finish: validate error")),
    (V.DISCOVERED, False, PASSED, QUEUED, WAITS),
    (V.DISCOVERED, False, PASSED, RUNNING, WAITS),
    (V.DISCOVERED, False, PASSED, PASSED, Plan(V.READY, "evaluate says")),
    (V.DISCOVERED, False, PASSED, Verdict.NOT_APPLICABLE, Plan(V.READY, "evaluate says")),
    (V.DISCOVERED, False, PASSED, Verdict.REJECTED, Plan(V.REJECTED, "evaluate says")),
    (V.DISCOVERED, False, PASSED, FAILED, Plan(V.REJECTED, "evaluate did not finish: evaluate error")),
    (V.DISCOVERED, False, RUNNING, PASSED, WAITS),
    (V.DISCOVERED, False, FAILED, PASSED, Plan(V.QUARANTINED, "validate did not finish: validate error")),
    (V.DISCOVERED, True, PASSED, QUEUED, Plan(V.READY, "validate says")),
    (V.READY, True, PASSED, RUNNING, Plan(V.READY, "validate says")),
    (V.READY, True, PASSED, PASSED, Plan(V.READY, "evaluate says")),
    (V.READY, True, PASSED, Verdict.REJECTED, Plan(V.REJECTED, "evaluate says")),
    (V.READY, True, PASSED, FAILED, Plan(V.REJECTED, "evaluate did not finish: evaluate error")),
    (V.READY, False, PASSED, PASSED, Plan(V.READY, "evaluate says")),
    (V.DISCOVERED, False, ASIDE, None, Plan(V.DISCOVERED, "validate did not finish: validate error")),
    (V.DISCOVERED, True, PASSED, ASIDE, Plan(V.DISCOVERED, "evaluate did not finish: evaluate error")),
    (V.READY, True, PASSED, ASIDE, Plan(V.REJECTED, "evaluate did not finish: evaluate error")),
]


@pytest.mark.parametrize(("status", "fast", "validate", "evaluate", "expected"), TABLE)
def test_plan(
    status: VersionStatus,
    fast: bool,
    validate: JobState | Verdict | None,
    evaluate: JobState | Verdict | None,
    expected: Plan,
) -> None:
    """Status and jobs name the next status and jobs, in both lanes."""
    jobs = [job(stage, seen) for stage, seen in ((S.VALIDATE, validate), (S.EVALUATE, evaluate)) if seen is not None]
    for order in (jobs, jobs[::-1]):
        assert plan(status, "", fast=fast, jobs=order) == expected


@pytest.mark.parametrize("status", [status for status in V if status not in (V.DISCOVERED, V.READY)])
def test_an_ended_version_plans_nothing(status: VersionStatus) -> None:
    """Whatever its jobs say afterwards."""
    late = [job(S.VALIDATE, Verdict.PASSED), job(S.EVALUATE, Verdict.REJECTED)]
    assert plan(status, "why", fast=False, jobs=late) == Plan(status, "why")
    assert plan(status, "why", fast=False, jobs=[]) == Plan(status, "why")


@pytest.mark.parametrize(("status", "fast", "validate", "evaluate", "expected"), TABLE)
def test_a_plan_is_legal(status: VersionStatus, fast: bool, validate: object, evaluate: object, expected: Plan) -> None:
    """Every change of status in the table is allowed by the transitions."""
    if expected.status is not status:
        lifecycle.check(status, expected.status)


def test_an_illegal_transition_says_what_is_allowed() -> None:
    """The error carries both ends and names the ways out."""
    with pytest.raises(
        IllegalTransition, match="it is ready, which cannot become discovered: it may become archived or"
    ) as bad:
        lifecycle.check(V.READY, V.DISCOVERED)
    assert (bad.value.old, bad.value.new) == (V.READY, V.DISCOVERED)
    with pytest.raises(IllegalTransition, match="nothing follows"):
        lifecycle.check(RolloutStatus.FINISHED, RolloutStatus.RUNNING)


def test_transitions_are_complete() -> None:
    """Every status of versions and rollouts has its row, and stays among its own kind."""
    assert set(TRANSITIONS) == {*VersionStatus, *RolloutStatus}
    for old, allowed in TRANSITIONS.items():
        assert all(type(new) is type(old) for new in allowed)
        assert old not in allowed


P = VariantStatus.PENDING
BUILD = [(S.COMPRESS, ""), (S.EVALUATE, "")]
SHARDED = [(S.COMPRESS, "0"), (S.COMPRESS, "1"), (S.ASSEMBLE, ""), (S.EVALUATE, "")]


def variant_jobs(order: list[tuple[Stage, str]], *outcomes: JobState | Verdict) -> list[VariantJob]:
    """The first jobs of a variant, in the order in which they come."""
    return [
        VariantJob(stage, part, seen.state, seen.verdict, seen.reason)
        for (stage, part), outcome in zip(order, outcomes, strict=False)
        for seen in [job(stage, outcome)]
    ]


VARIANT_TABLE = [
    # order, outcomes so far → plan
    (BUILD, [], VariantPlan(P, "", ((S.COMPRESS, ""),))),
    (BUILD, [QUEUED], VariantPlan(P, "")),
    (BUILD, [RUNNING], VariantPlan(P, "")),
    (BUILD, [JobState.CANCELLED], VariantPlan(P, "")),
    (BUILD, [FAILED], VariantPlan(VariantStatus.FAILED, "compress did not finish: compress error")),
    (BUILD, [Verdict.REJECTED], VariantPlan(VariantStatus.FAILED, "compress says")),
    (BUILD, [Verdict.NOT_APPLICABLE], VariantPlan(VariantStatus.NOT_APPLICABLE, "compress says")),
    (BUILD, [PASSED], VariantPlan(P, "compress says", ((S.EVALUATE, ""),))),
    (BUILD, [PASSED, RUNNING], VariantPlan(P, "compress says")),
    (BUILD, [PASSED, PASSED], VariantPlan(VariantStatus.READY, "evaluate says")),
    (BUILD, [PASSED, Verdict.REJECTED], VariantPlan(VariantStatus.REJECTED, "evaluate says")),
    (BUILD, [PASSED, Verdict.NOT_APPLICABLE], VariantPlan(VariantStatus.NOT_APPLICABLE, "evaluate says")),
    (BUILD, [PASSED, FAILED], VariantPlan(VariantStatus.FAILED, "evaluate did not finish: evaluate error")),
    (SHARDED, [], VariantPlan(P, "", ((S.COMPRESS, "0"), (S.COMPRESS, "1")))),
    (SHARDED, [PASSED], VariantPlan(P, "", ((S.COMPRESS, "1"),))),
    (SHARDED, [PASSED, RUNNING], VariantPlan(P, "")),
    (SHARDED, [RUNNING, Verdict.NOT_APPLICABLE], VariantPlan(VariantStatus.NOT_APPLICABLE, "compress says")),
    (SHARDED, [PASSED, PASSED], VariantPlan(P, "compress says", ((S.ASSEMBLE, ""),))),
    (SHARDED, [PASSED, PASSED, Verdict.REJECTED], VariantPlan(VariantStatus.FAILED, "assemble says")),
    (SHARDED, [PASSED, PASSED, PASSED], VariantPlan(P, "assemble says", ((S.EVALUATE, ""),))),
    (SHARDED, [PASSED, PASSED, PASSED, PASSED], VariantPlan(VariantStatus.READY, "evaluate says")),
]


@pytest.mark.parametrize(("order", "outcomes", "expected"), VARIANT_TABLE)
def test_plan_variant(
    order: list[tuple[Stage, str]], outcomes: list[JobState | Verdict], expected: VariantPlan
) -> None:
    """Compress, assemble what was sharded, evaluate: each step waits for the one before, and every end is legal."""
    jobs, shards = variant_jobs(order, *outcomes), 2 if order is SHARDED else 1
    for turned in (jobs, jobs[::-1]):
        assert plan_variant(P, "", jobs=turned, shards=shards, kinds=["aa"]) == expected
    if expected.status is not P:
        lifecycle.check(P, expected.status)


def test_a_ready_variant_is_measured_once_a_kind() -> None:
    """Whatever a benchmark says, the status stays; a kind that is there already is not measured again."""
    seen = VariantJob(S.BENCHMARK, "aa", FAILED, None, "never quiet")
    ready = VariantPlan(VariantStatus.READY, "fine", ((S.BENCHMARK, "bb"),))
    assert plan_variant(VariantStatus.READY, "fine", jobs=[seen], kinds=["aa", "bb"]) == ready


@pytest.mark.parametrize("status", [VariantStatus.FAILED, VariantStatus.NOT_APPLICABLE, VariantStatus.REJECTED])
def test_an_ended_variant_plans_nothing(status: VariantStatus) -> None:
    """It is not measured either."""
    late = variant_jobs(BUILD, PASSED, PASSED)
    assert plan_variant(status, "why", jobs=late, kinds=["aa"]) == VariantPlan(status, "why")


def test_variant_transitions_are_complete() -> None:
    """Every status has its row; a new judgement opens every end again."""
    assert set(VARIANT_TRANSITIONS) == set(VariantStatus)
    assert all(P in VARIANT_TRANSITIONS[status] for status in VariantStatus if status is not P)


def test_every_active_rollout_can_end() -> None:
    """From every active status some end is reachable, and no end is active."""
    ends = {status for status in RolloutStatus if not TRANSITIONS[status]}
    assert ends.isdisjoint(lifecycle.ACTIVE_ROLLOUT)
    for status in lifecycle.ACTIVE_ROLLOUT:
        reached = {status}
        while more := {new for old in reached for new in TRANSITIONS[old] if isinstance(new, RolloutStatus)} - reached:
            reached |= more
        assert reached & ends
