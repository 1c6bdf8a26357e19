"""Benchmarks: what was measured of a variant on one kind of device, by a worker of ours or imported from elsewhere.

Every measurement is kept. A fact is the newest valid one of the artifact that the variant has now.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime

from sqlalchemy import select
from sqlmodel import col

from weighbridge.registry import db, events, schemas
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Invalid, NotFound
from weighbridge.registry.models import Benchmark, Model, Variant, Version

VALID = "valid"
_KIND = re.compile(r"[0-9a-f]{16}")
_NEEDED = ("p50", "p99", "throughput", "memory")
"""What a choice compares: a valid benchmark has all of them."""
_INTERVALS = (("speedup_low", "speedup_high"), ("throughput_low", "throughput_high"))
_POSITIVE = (*_NEEDED, "load_seconds", "speedup", "throughput_ratio", *(end for ends in _INTERVALS for end in ends))
_NOT_NEGATIVE = ("energy", "spread")
_LATENCIES = ("p50", "p90", "p95", "p99", "mean")
_ROW_POSITIVE = ("batch", "concurrency", "rate", "count", *_LATENCIES, "throughput", "ratio", "low", "high")
_CLOCKS_DIFFER = 300.0
"""Seconds that the clock of whoever measured may be ahead."""


def record(tx: Session, variant: Variant, seen: schemas.Benchmark, *, source: str, actor: str) -> Benchmark:
    """Keep a measurement; a valid one of the variant's present artifact is the fact from now on.

    Raises Invalid for what cannot have been measured.
    """
    _check(seen)
    now = db.clock(tx)
    measured_at = _seconds(seen.measured_at) if seen.measured_at else now
    if measured_at > now + _CLOCKS_DIFFER:
        raise Invalid(f"benchmark: measured_at {seen.measured_at} lies in the future: set the clock of that machine")
    assert variant.id is not None
    said = seen.model_dump(mode="json", exclude={"source", "measured_at"})
    row = Benchmark(variant_id=variant.id, **said, source=source, measured_at=measured_at)
    tx.add(row)
    tx.flush()
    _tell(tx, variant, row, actor=actor)
    return row


def import_(tx: Session, seen: schemas.Benchmark, *, source: str, actor: str) -> list[Benchmark]:
    """Record a measurement for every variant that has this artifact.

    Raises NotFound naming the digest, Invalid for what cannot have been measured.
    """
    mine = select(Variant).where(col(Variant.artifact_digest) == seen.artifact_digest).order_by(col(Variant.id))
    found = list(tx.scalars(mine))
    if not found:
        raise NotFound("variant", f"with artifact {seen.artifact_digest}")
    return [record(tx, variant, seen, source=source, actor=actor) for variant in found]


def facts(tx: Session, version_id: int) -> dict[str, dict[str, Benchmark]]:
    """The newest valid measurement of every variant's present artifact: {kind of device: {variant: benchmark}}."""
    statement = (
        select(col(Variant.name), Benchmark)
        .join(Benchmark, col(Benchmark.variant_id) == col(Variant.id))
        .where(col(Variant.version_id) == version_id, col(Benchmark.status) == VALID)
        .where(col(Benchmark.artifact_digest) == col(Variant.artifact_digest))
        .order_by(col(Benchmark.measured_at), col(Benchmark.id))
    )
    newest: dict[str, dict[str, Benchmark]] = {}
    for name, row in tx.execute(statement):
        newest.setdefault(row.kind, {})[name] = row
    return newest


def listing(tx: Session, version_id: int, *, skip: int = 0, limit: int | None = None) -> list[tuple[str, Benchmark]]:
    """Measurements of a version's variants, invalid ones and older artifacts' too, newest first."""
    statement = (
        select(col(Variant.name), Benchmark)
        .join(Benchmark, col(Benchmark.variant_id) == col(Variant.id))
        .where(col(Variant.version_id) == version_id)
        .order_by(col(Benchmark.measured_at).desc(), col(Benchmark.id).desc())
        .offset(skip)
        .limit(limit)
    )
    return [(name, row) for name, row in tx.execute(statement)]


def _check(seen: schemas.Benchmark) -> None:
    """Raises Invalid naming everything that is wrong."""
    if wrong := list(_nonsense(seen)):
        raise Invalid(f"benchmark of {seen.artifact_digest[:12] or 'no artifact'}: {'; '.join(wrong)}")


def _nonsense(seen: schemas.Benchmark) -> Iterator[str]:
    if not _KIND.fullmatch(seen.kind):
        yield f"kind {seen.kind!r} is not a hardware fingerprint (16 hex digits)"
    if seen.hardware.get("kind", seen.kind) != seen.kind:
        yield f"kind {seen.kind} is not that of its hardware, {seen.hardware['kind']}"
    values = seen.model_dump()
    if seen.status == VALID:
        yield from (f"{name} is missing from a valid benchmark" for name in _NEEDED if values[name] is None)
    yield from _wrong_numbers(values, _POSITIVE, "")
    yield from (
        f"{name} is {values[name]}: it is a finite number, not negative"
        for name in _NOT_NEGATIVE
        if values[name] is not None and not 0 <= values[name] < math.inf
    )
    for low, high in _INTERVALS:
        if (values[low] is None) != (values[high] is None):
            yield f"of {low} and {high} one is missing"
        elif values[low] is not None and values[low] > values[high]:
            yield f"{low} {values[low]:g} is above {high} {values[high]:g}"
    if seen.p50 is not None and seen.p99 is not None and seen.p50 > seen.p99:
        yield f"p50 {seen.p50:g} s is above p99 {seen.p99:g} s"
    for number, row in enumerate(values["rows"]):
        yield from _wrong_numbers(row, _ROW_POSITIVE, f"rows.{number}.")


def _wrong_numbers(values: dict[str, float | None], fields: tuple[str, ...], where: str) -> Iterator[str]:
    for name in fields:
        value = values[name]
        if value is not None and not 0 < value < math.inf:
            yield f"{where}{name} is {value}: it is a finite number above 0"


def _seconds(moment: datetime) -> float:
    """A time without a zone is UTC, as everywhere in the API."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _tell(tx: Session, variant: Variant, row: Benchmark, *, actor: str) -> None:
    version = tx.get_one(Version, variant.version_id)
    after = {
        "name": variant.name,
        "kind": row.kind,
        "status": row.status,
        "finding": row.finding,
        "speedup": row.speedup,
        "speedup_interval": [row.speedup_low, row.speedup_high],
        "contended": row.contended,
        "p50": row.p50,
        "p99": row.p99,
        "throughput": row.throughput,
        "memory": row.memory,
        "source": row.source,
    }
    events.record(
        tx,
        "variant.benchmarked",
        model=tx.get_one(Model, version.model_id).name,
        version=version.number,
        subject=f"variant:{variant.id}",
        after=after,
        actor=actor,
        reason=row.reason,
    )
