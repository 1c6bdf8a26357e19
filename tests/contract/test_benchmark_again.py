"""What a busy machine could not show is said, tried again some times, and whenever somebody asks; on both databases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fixtures.registry import record as record_version
from fixtures.registry import work

from weighbridge.registry import artifacts, benchmarks, db, jobs, placement, variants, workers_seen
from weighbridge.registry.db import Database
from weighbridge.registry.errors import Conflict, NotFound
from weighbridge.registry.jobs import Claim
from weighbridge.registry.lifecycle import JobState, Stage, VariantStatus, Verdict
from weighbridge.registry.models import Job, Version
from weighbridge.registry.schemas import Benchmark
from weighbridge.workers import variant_stages
from weighbridge.workers.outcome import Outcome

CPU = "c" * 16
BESIDE = "other processes took 48% of the processors"
FREE: dict[str, Any] = {"p50": 0.5e-3, "p99": 0.56e-3, "throughput": 10_000.0, "memory": 1 << 30, "spread": 0.13}


def seen(artifact: str, **changes: Any) -> Benchmark:
    ratio = {"finding": "same", "speedup": 1.0, "speedup_low": 0.9, "speedup_high": 1.1}
    return Benchmark(artifact_digest=artifact * 64, kind=CPU, status="valid", **{**FREE, **ratio, **changes})


def faster(**changes: Any) -> Benchmark:
    ratio = {"finding": "faster", "speedup": 3.5, "speedup_low": 3.1, "speedup_high": 4.0}
    return seen("b", **{**ratio, **changes})


def lost() -> Outcome:
    row = Benchmark(artifact_digest="b" * 64, kind=CPU, status="invalid_noisy", reason="the 120 s were over")
    return Outcome(Verdict.NOISY, row.reason, {"benchmark": row.model_dump(mode="json")})


@pytest.fixture
def open_version(database: Database) -> Callable[[str], None]:
    """A ready version 1 whose variant `bf16` is ready too, with their benchmarks queued; by its objective."""

    def make(objective: str) -> None:
        with database.transaction() as tx:
            hardware = {"kind": CPU, "device": "cpu", "memory_bytes": 1 << 30}
            workers_seen.seen(tx, "w", machine="m", queues=["variants"], kind=CPU, hardware=hardware)
            recorded = record_version(tx, "a", recipe_text=f"{{variants: [bf16], objective: {objective}}}")
            artifacts.store_artifact(tx, 1, artifact_digest="a" * 64, blobs={})
            work(tx, work(tx, recorded.jobs[0].id)[0])
            while (job := next(iter(queued(tx)), None)) and job.stage != Stage.BENCHMARK:
                claim = claimed(tx, job)
                variants.lock(tx, claim.subject_id)
                if job.stage == Stage.COMPRESS:
                    artifacts.store_artifact(tx, 1, "bf16", artifact_digest="b" * 64, blobs={})
                jobs.finish(tx, claim, Verdict.PASSED, "fine", {})
                variants.advance(tx, claim.subject_id, actor="worker")
            assert variants.get(tx, 1, "bf16").status == VariantStatus.READY

    return make


def queued(tx: db.Session) -> Sequence[Job]:
    rows = [job for mine in variants.jobs_of(tx, 1).values() for job in mine]
    return sorted((job for job in rows if job.state == JobState.QUEUED), key=lambda job: job.id or 0)


def claimed(tx: db.Session, job: Job) -> Claim:
    claim = jobs.claim(tx, job.id or 0, "worker", 30)
    assert claim is not None
    return claim


def end(database: Database, variant: str, outcome: Benchmark | Outcome) -> Job:
    """Do the variant's benchmark, due or not yet, as a worker ends one."""
    if isinstance(outcome, Benchmark):
        outcome = Outcome.passed("fine", {"benchmark": outcome.model_dump(mode="json")})
    with database.transaction() as tx:
        (job,) = (job for job in variants.jobs_of(tx, 1)[variant] if job.stage == Stage.BENCHMARK)
        job.not_before = 0.0
        tx.add(job)
        tx.flush()
        claim = claimed(tx, job)
        variant_stages.record(tx, claim=claim, outcome=outcome)
        variants.advance(tx, claim.subject_id, actor="worker")
        return jobs.get(tx, claim.job_id)


def newest(database: Database) -> str:
    with database.read() as tx:
        return benchmarks.listing(tx, 1)[0][1].reason


def test_a_ratio_measured_beside_other_work_chooses(database: Database, open_version: Callable[[str], None]) -> None:
    """It decides all that the recipe asks: nothing is tried again, and the reason has the interval and the mark."""
    open_version("{best: latency}")
    assert end(database, "original", seen("a", contended=BESIDE)).state == JobState.DONE
    assert end(database, "bf16", faster(contended=BESIDE)).state == JobState.DONE
    with database.read() as tx:
        assert variants.settled(tx, 1)
        choice = placement.choices(tx, tx.get_one(Version, 1), [CPU])[CPU]
    assert (choice.variant, choice.measured) == ("bf16", True)
    assert choice.reason.startswith(
        f"3.5 × faster than the original (3.10–4.00 × its speed), measured beside other work ({BESIDE})"
    )
    assert newest(database) == ""


def test_a_limit_needs_a_free_machine(database: Database, open_version: Callable[[str], None]) -> None:
    """What is measured beside other work meets none, however fast: it says so, with the next try and the command, and
    holds nothing up. Tries are bounded; the last one ends the job."""
    open_version("{best: latency, max_p99: 0.01}")
    end(database, "original", seen("a"))
    for number, pause in enumerate((60, 300, 1800), start=1):
        job = end(database, "bf16", faster(contended=BESIDE))
        with database.read() as tx:
            assert (job.state, job.attempt) == (JobState.QUEUED, number)
            assert job.not_before == pytest.approx(db.clock(tx) + pause, abs=30)
            assert variants.settled(tx, 1), "the choice waits for no retry"
            choice = placement.choices(tx, tx.get_one(Version, 1), [CPU])[CPU]
        assert choice.variant == "original"
        assert "bf16 is not known to meet max_p99 (measured beside other work" in choice.reason
        assert f"max_p99 cannot be judged beside other work ({BESIDE}); next try " in newest(database)
        assert newest(database).endswith("or now: `weighbridge benchmark retry digits 1 bf16`")
    job = end(database, "bf16", faster(contended=BESIDE))
    assert (job.state, job.verdict) == (JobState.DONE, Verdict.PASSED)
    assert "not tried again by itself, or now: `weighbridge benchmark retry" in newest(database)


def test_a_free_machine_later_decides(database: Database, open_version: Callable[[str], None]) -> None:
    """The next try replaces the marked figures, and the variant is chosen."""
    open_version("{best: latency, max_p99: 0.01}")
    end(database, "original", seen("a"))
    assert end(database, "bf16", faster(contended=BESIDE)).state == JobState.QUEUED
    assert end(database, "bf16", faster(p99=0.2e-3, p50=0.1e-3)).state == JobState.DONE
    with database.read() as tx:
        choice = placement.choices(tx, tx.get_one(Version, 1), [CPU])[CPU]
    assert choice.variant == "bf16"
    assert choice.reason.startswith("p99 0.20 ms, 3.5 × faster than the original (3.10–4.00 × its speed)")


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({"finding": "same", "speedup": 1.0, "speedup_low": 0.5, "speedup_high": 2.5}, True),
        ({"finding": "same", "speedup": 1.0, "speedup_low": 0.9, "speedup_high": 1.12}, False),
        ({"speedup_low": 1.01, "speedup_high": 9.0}, False),
    ],
)
def test_an_interval_that_shows_nothing_is_measured_again(
    database: Database, open_version: Callable[[str], None], changes: dict[str, Any], again: bool
) -> None:
    """`same` within a tenth is an answer; anything between half and twice as fast is none."""
    open_version("{best: latency}")
    job = end(database, "bf16", faster(contended=BESIDE, **changes))
    assert (job.state == JobState.QUEUED, "too wide to say more" in newest(database)) == (again, again)


def test_nothing_measured_is_tried_again(database: Database, open_version: Callable[[str], None]) -> None:
    """The row is no fact and says when; after the last try the verdict stands, and no error."""
    open_version("{best: latency}")
    for _ in range(variants.BENCHMARK_TRIES - 1):
        assert end(database, "bf16", lost()).state == JobState.QUEUED
        assert newest(database).startswith("the 120 s were over; next try ")
    job = end(database, "bf16", lost())
    assert (job.state, job.verdict) == (JobState.DONE, Verdict.NOISY)
    with database.read() as tx:
        assert variants.get(tx, 1, "bf16").status == VariantStatus.READY
        assert "bf16" not in benchmarks.facts(tx, 1).get(CPU, {})


def test_whoever_asks_gets_another_try(database: Database, open_version: Callable[[str], None]) -> None:
    """Of one variant or of all; waiting tries are due at once, ended ones again, and a running one goes on."""
    open_version("{best: latency, max_p99: 0.01}")
    with database.transaction() as tx, pytest.raises(NotFound, match="variant fp16"):
        variants.measure_again(tx, 1, "fp16")
    assert end(database, "original", seen("a")).state == JobState.DONE
    assert end(database, "bf16", faster(contended=BESIDE)).state == JobState.QUEUED
    with database.transaction() as tx:
        (job,) = variants.measure_again(tx, 1, "bf16")
        assert (job.state, job.attempt, job.max_attempts) == (JobState.QUEUED, 1, 5)
        assert not variants.settled(tx, 1), "what is due is to come"
        claim = claimed(tx, job)
        both = variants.measure_again(tx, 1)
        assert [job.state for job in both] == [JobState.QUEUED, JobState.RUNNING]
        assert claim.attempt == 2
        jobs.heartbeat(tx, claim, 30)


def test_what_is_not_measured_cannot_be_measured_again(database: Database, open_version: Callable[[str], None]) -> None:
    """The answer says what is missing."""
    with database.transaction() as tx:
        recorded = record_version(tx, "a", recipe_text="{variants: [bf16], benchmark: false}")
        assert recorded.version.id == 1
        with pytest.raises(Conflict, match="version 1 has no benchmarks to run again"):
            variants.measure_again(tx, 1)
