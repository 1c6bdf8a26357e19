"""Benchmarks, the workers that take them, and the choice made of them, on both databases."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fixtures.registry import record, work
from sqlalchemy import update
from sqlmodel import col, select

from weighbridge.registry import archiving, artifacts, benchmarks, db, placement, variants, workers_seen
from weighbridge.registry.db import Database, Session
from weighbridge.registry.errors import Conflict, Invalid, NotFound
from weighbridge.registry.lifecycle import VariantStatus, kind_queue
from weighbridge.registry.models import Event, Host, Variant, Version, WorkerNode
from weighbridge.registry.schemas import Benchmark, BenchmarkRow, Metric

CPU, CUDA = "c" * 16, "d" * 16
GIB = 1 << 30
ROW = {"scenario": "single_stream", "mode": "eager", "count": 459} | dict.fromkeys(
    ("p50", "p90", "p95", "p99", "mean", "throughput"), 1.0
)


def seen(artifact: str = "a" * 64, **changes: Any) -> Benchmark:
    """A valid measurement."""
    figures = {"p50": 0.5e-3, "p99": 0.56e-3, "throughput": 10_000.0, "memory": GIB, "spread": 0.05}
    hardware = {"hardware": {"label": "2 × Xeon"}, "status": "valid", "kind": CPU}
    return Benchmark.model_validate({"artifact_digest": artifact, **hardware, **figures, **changes})


def fast(artifact: str = "b" * 64, **changes: Any) -> Benchmark:
    return seen(artifact, **{"p50": 0.15e-3, "p99": 0.18e-3, "finding": "faster", **changes})


@pytest.fixture
def version(database: Database) -> int:
    """The id of a ready version with a ready variant `bf16` that kept 99.7%, and one that failed."""
    with database.transaction() as tx:
        recorded = record(tx, "a", recipe_text="variants: [bf16, fp16]")
        artifacts.store_artifact(tx, 1, artifact_digest="a" * 64, blobs={}, size=400)
        work(tx, work(tx, recorded.jobs[0].id)[0])
        for name, status, digest in (("bf16", "ready", "b" * 64), ("fp16", "failed", None)):
            row = variants.get(tx, 1, name)
            row.status, row.artifact_digest = VariantStatus(status), digest
            tx.add(row)
        artifacts.record_metrics(
            tx, variants.get(tx, 1, "bf16").id or 0, [Metric(name="kept", value=0.997)], judgement=1
        )
    return 1


def keep(tx: Session, *measured: Benchmark) -> None:
    for one in measured:
        benchmarks.import_(tx, one, source="bench.json", actor="ann")


def test_a_measurement_is_kept_and_told(database: Database, version: int) -> None:
    """Whole, with its rows, who measured it and when; the feed has the figures."""
    row = BenchmarkRow.model_validate(ROW)
    measured_at = datetime(2026, 1, 1, tzinfo=UTC)
    with database.transaction() as tx:
        (kept,) = benchmarks.import_(
            tx, fast(rows=[row], energy=0.0, measured_at=measured_at), source="bench.json", actor="ann"
        )
        assert (kept.source, kept.measured_at, kept.rows[0]["count"]) == ("bench.json", measured_at.timestamp(), 459)
        now = benchmarks.record(tx, variants.get(tx, version, "bf16"), fast(), source="worker-1", actor="job:9")
        assert abs(now.measured_at - db.clock(tx)) < 5
        assert [(name, row.source) for name, row in benchmarks.listing(tx, version)] == [
            ("bf16", "worker-1"),
            ("bf16", "bench.json"),
        ]
        told = tx.scalars(select(Event).where(Event.kind == "variant.benchmarked").order_by(col(Event.id))).all()
    assert [(event.actor, event.version, event.after["name"], event.after["p99"]) for event in told] == [
        ("ann", 1, "bf16", 0.18e-3),
        ("job:9", 1, "bf16", 0.18e-3),
    ]


def test_the_newest_valid_measurement_of_the_present_artifact_is_the_fact(database: Database, version: int) -> None:
    """A noisy one never is, an older one that comes late neither, nor one of an artifact that was replaced."""
    day = timedelta(days=1)
    with database.transaction() as tx:
        now = datetime.fromtimestamp(db.clock(tx), UTC)
        keep(tx, fast(p99=0.2e-3, measured_at=now - day))
        keep(tx, fast(status="invalid_noisy", reason="another process took 40% of the processors"))
        keep(tx, fast(p99=0.3e-3, measured_at=now - 2 * day), seen(kind=CUDA))
        found = benchmarks.facts(tx, version)
        assert {kind: {name: row.p99 for name, row in rows.items()} for kind, rows in found.items()} == {
            CPU: {"bf16": 0.2e-3},
            CUDA: {"original": 0.56e-3},
        }
        keep(tx, fast(p99=0.19e-3))
        assert benchmarks.facts(tx, version)[CPU]["bf16"].p99 == 0.19e-3
        tx.execute(update(Variant).where(col(Variant.name) == "bf16").values(artifact_digest="e" * 64))
        assert CPU not in benchmarks.facts(tx, version)
        assert len(benchmarks.listing(tx, version)) == 5


def test_an_unknown_artifact_is_named(database: Database, version: int) -> None:
    """A measurement of something else is not recorded for anything here."""
    with database.transaction() as tx, pytest.raises(NotFound, match=f"no variant with artifact {'f' * 64}"):
        keep(tx, seen("f" * 64))


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"p99": 0.0, "p50": None}, "p50 is missing from a valid benchmark; p99 is 0.0: it is a finite number above 0"),
    ({"p50": math.nan}, "p50 is nan: it is a finite number above 0"),
    ({"throughput": math.inf}, "throughput is inf"),
    ({"memory": -1}, "memory is -1"),
    ({"spread": -0.1}, "spread is -0.1: it is a finite number, not negative"),
    ({"energy": math.nan}, "energy is nan"),
    ({"speedup": 0}, "speedup is 0.0"),
    ({"speedup_low": 2.0}, "of speedup_low and speedup_high one is missing"),
    ({"speedup_low": 2.0, "speedup_high": 1.0}, "speedup_low 2 is above speedup_high 1"),
    ({"throughput_low": -1.0, "throughput_high": 1.0}, "throughput_low is -1.0: it is a finite number above 0"),
    ({"p50": 1.0}, "p50 1 s is above p99 0.00056 s"),
    ({"kind": "my laptop"}, "kind 'my laptop' is not a hardware fingerprint"),
    ({"hardware": {"kind": CUDA}}, f"kind {CPU} is not that of its hardware, {CUDA}"),
    ({"measured_at": "2999-01-01T00:00:00"}, "lies in the future"),
    ({"rows": [{**ROW, "count": 0, "p50": -1}]}, "rows.0.count is 0: it is a finite number above 0; rows.0.p50 is -1"),
]


def test_nonsense_is_refused(database: Database, version: int) -> None:
    """Everything wrong is named, and nothing is kept."""
    with database.transaction() as tx:
        for changes, message in NONSENSE:
            with pytest.raises(Invalid) as wrong:
                keep(tx, seen(**changes))
            assert message in str(wrong.value)
        assert benchmarks.listing(tx, version) == []


def test_each_kind_of_host_gets_what_was_measured_on_it(database: Database, version: int) -> None:
    """A faster variant where that was measured, with its numbers; the original wherever it was not."""
    with database.transaction() as tx:
        keep(tx, seen(), fast(), fast(kind=CUDA))
        found = placement.choices(tx, tx.get_one(Version, version), [CPU, CUDA, "e" * 16, ""])
    assert {kind: (choice.variant, choice.artifact[0], choice.measured) for kind, choice in found.items()} == {
        "": ("original", "a", False),
        CPU: ("bf16", "b", True),
        CUDA: ("original", "a", False),
        "e" * 16: ("original", "a", False),
    }
    assert found[CPU].reason == ("p99 0.18 ms, 3.1 × faster than the original's 0.56 ms, keeps 99.7% of its accuracy")
    assert (found[CPU].label, found[CPU].front) == ("2 × Xeon", ["original", "bf16"])
    assert found[CUDA].reason.startswith("the original was not measured on this kind yet")
    assert found["e" * 16].reason == "not measured on this kind yet (no worker of this kind is there to measure it)"
    assert found[""].reason == "a kind of host that nobody measured gets the original"


def test_a_variant_that_is_not_ready_is_never_chosen(database: Database, version: int) -> None:
    """However fast it was; and of a version whose original is not ready nothing is."""
    with database.transaction() as tx:
        keep(tx, seen(), fast())
        row = tx.get_one(Version, version)
        tx.execute(update(Variant).where(col(Variant.name) == "bf16").values(status="rejected"))
        assert placement.choices(tx, row, [CPU])[CPU].variant == "original"
        archiving.archive(tx, "digits", 1, actor="ann", reason="old")
        tx.execute(update(Variant).where(col(Variant.name) == "original").values(status="pending"))
        with pytest.raises(Conflict, match="version 1 has no original that is ready"):
            placement.choices(tx, row, [CPU])


def test_the_share_that_was_kept_is_this_judgements(database: Database, version: int) -> None:
    """A metric of an earlier judgement does not count; the variant's facts stand in, else drift alone judged it."""
    with database.transaction() as tx:
        keep(tx, seen(), fast())
        row = tx.get_one(Version, version)
        row.judgement = 2
        tx.flush()
        assert placement.choices(tx, row, [CPU])[CPU].reason.endswith("judged by its drift")
        variants.get(tx, version, "bf16").facts = {"kept": 0.95}
        tx.flush()
        assert placement.choices(tx, row, [CPU])[CPU].reason.endswith("keeps 95.0% of its accuracy")


def say(tx: Session, owner: str, kind: str = CPU, queues: tuple[str, ...] = ("variants",), device: str = "cpu") -> None:
    hardware = {"kind": kind, "device": device, "memory_bytes": GIB}
    workers_seen.seen(tx, owner, machine="m", queues=queues, kind=kind, hardware=hardware)


def test_workers_count_while_they_speak(database: Database) -> None:
    """A silent one, one that ended, and one that takes no variant work measure nothing; very old rows go."""
    with database.transaction() as tx:
        say(tx, "a")
        say(tx, "b", CUDA, (kind_queue(CUDA),), "cuda")
        say(tx, "c", "e" * 16, ("cpu", "control"))
        say(tx, "a")
        assert sorted(workers_seen.kinds(tx)) == [CPU, CUDA]
        assert workers_seen.kinds(tx)[CUDA]["device"] == "cuda"
        workers_seen.gone(tx, "b")
        tx.execute(update(WorkerNode).where(col(WorkerNode.owner) == "a").values(seen_at=WorkerNode.seen_at - 121))
        assert workers_seen.kinds(tx) == {}
        assert list(workers_seen.kinds(tx, within=300)) == [CPU]
        tx.execute(update(WorkerNode).values(seen_at=1.0))
        say(tx, "d")
        assert tx.scalars(select(WorkerNode.owner)).all() == ["d"]


def test_versions_are_measured_on_the_kinds_that_hosts_have(database: Database) -> None:
    """Of the workers' kinds; on all of these while no host is of any of them."""
    with database.transaction() as tx:
        assert workers_seen.measured_kinds(tx) == []
        say(tx, "a")
        say(tx, "b", CUDA, ("gpu",), "cuda")
        assert workers_seen.measured_kinds(tx) == [CPU, CUDA]
        tx.add(Host(id="h1", device={"kind": "e" * 16}))
        tx.add(Host(id="h2", device={"kind": CPU}, state="retired"))
        tx.add(Host(id="h3"))
        tx.flush()
        assert workers_seen.measured_kinds(tx) == [CPU, CUDA]
        tx.add(Host(id="h4", device={"kind": CUDA}))
        tx.flush()
        assert workers_seen.measured_kinds(tx) == [CUDA]


def test_a_need_is_met_by_one_worker_whole(database: Database) -> None:
    """On the queue where the job would go, and with all that it needs."""
    with database.transaction() as tx:
        say(tx, "a")
        say(tx, "b", CUDA, ("gpu",), "cuda")
        assert workers_seen.can(tx, {"device": "cuda"}, "gpu")
        assert not workers_seen.can(tx, {"device": "cuda"}, "variants")
        assert workers_seen.can(tx, {"memory": GIB})
        assert not workers_seen.can(tx, {"memory": GIB + 1})
        assert not workers_seen.can(tx, {"device": "cuda", "kind": CPU})
