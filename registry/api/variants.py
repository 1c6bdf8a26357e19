"""Variants: what became of each tensor, what was measured, and which kind of host gets which."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlmodel import col, select

from weighbridge import limits
from weighbridge.registry import benchmarks, events, placement, schemas, variants, versions, workers_seen
from weighbridge.registry.api import pages, views
from weighbridge.registry.api.auth import Approver, Reader
from weighbridge.registry.api.context import Ctx, Limit, ModelName, Name, NumberCursor, Selector
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.models import Host, Variant

router = APIRouter(prefix="/v1", tags=["variants"], route_class=Guarded)

_TensorCursor = Annotated[limits.Text, Query(max_length=limits.TENSOR, description="`next` of the page before.")]


@router.get("/models/{model}/versions/{selector}/variants/{name}/tensors")
def list_tensors(
    ctx: Ctx, _: Reader, model: ModelName, selector: Selector, name: Name, limit: Limit, after: _TensorCursor = ""
) -> schemas.Page[schemas.VariantTensor]:
    """What became of every tensor of a variant, by name; those of the original are as they came, and not listed."""
    with ctx.db.read() as tx:
        version = versions.get(tx, model, selector)
        variant = variants.get(tx, version.id or 0, name)
        rows = variants.tensors(tx, variant.id or 0, version.judgement, after=after, limit=limit)
    items = [schemas.VariantTensor(**row.model_dump()) for row in rows]
    return pages.page(items, [item.name for item in items], limit=limit, most_bytes=ctx.settings.page_bytes)


@router.get("/models/{model}/versions/{selector}/benchmarks")
def list_benchmarks(
    ctx: Ctx, _: Reader, model: ModelName, selector: Selector, limit: Limit, after: NumberCursor = None
) -> schemas.Page[schemas.VariantBenchmark]:
    """Every measurement of the version's variants, invalid ones too, newest first."""
    with ctx.db.read() as tx:
        rows = benchmarks.listing(tx, versions.get(tx, model, selector).id or 0, skip=after or 0, limit=limit)
    seen = [(after or 0) + 1 + number for number in range(len(rows))]
    return pages.page(views.benchmark_list(rows), seen, limit=limit, most_bytes=ctx.settings.page_bytes)


@router.get("/models/{model}/versions/{selector}/choices")
def list_choices(ctx: Ctx, _: Reader, model: ModelName, selector: Selector) -> list[schemas.Choice]:
    """Which variant each kind of host gets, and why: the kinds of enrolled hosts, of workers, and those measured.

    409 while the version's original is not ready.
    """
    with ctx.db.read() as tx:
        version = versions.get(tx, model, selector)
        hosts = tx.scalars(select(Host.device).where(col(Host.state) == "enrolled"))
        kinds = {str(device.get("kind") or "") for device in hosts}
        kinds |= {*workers_seen.kinds(tx), *benchmarks.facts(tx, version.id or 0)}
        return list(placement.choices(tx, version, kinds).values())


@router.post("/models/{model}/versions/{selector}/benchmarks/retry")
def retry_benchmarks(
    ctx: Ctx, who: Approver, model: ModelName, selector: Selector, variant: Annotated[limits.Id | None, Query()] = None
) -> list[schemas.Job]:
    """Measure the version's variants, or one of them, again on every kind of device; the jobs that do it.

    404 for another variant, 409 where nothing of it is measured.
    """
    with ctx.change("jobs") as tx:
        version = versions.get(tx, model, selector)
        found = variants.measure_again(tx, version.id or 0, variant)
        for job in found:
            events.record(
                tx, "variant.remeasured", model=model, version=version.number,
                subject=f"variant:{job.subject_id}", actor=who.name, after={"kind": job.part},
            )  # fmt: skip
        return [views.job_view(job) for job in found]


@router.post("/benchmarks", status_code=201)
def import_benchmark(ctx: Ctx, who: Approver, seen: schemas.Benchmark) -> list[schemas.VariantBenchmark]:
    """Record what was measured elsewhere, for every variant that has this artifact; it counts for what hosts are given.

    404 where no variant has it, 422 for what cannot have been measured.
    """
    with ctx.change("jobs", "hosts") as tx:
        rows = benchmarks.import_(tx, seen, source=f"{seen.source or 'import'} by {who.name}", actor=who.name)
        named = [(tx.get_one(Variant, row.variant_id).name, row) for row in rows]
        found = views.benchmark_list(named)
        for row in rows:
            variants.advance(tx, row.variant_id, actor=who.name, policies=ctx.policies)
        return found


@router.get("/workers")
def list_workers(ctx: Ctx, _: Reader) -> list[schemas.Worker]:
    """The workers that take variants' work and were heard of lately."""
    with ctx.db.read() as tx:
        return views.workers(workers_seen.live(tx))
