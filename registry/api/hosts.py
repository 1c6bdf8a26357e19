"""The host protocol (docs/host-protocol.md), and hosts as people see them."""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Path, Query
from sqlalchemy import select
from sqlmodel import col
from starlette.concurrency import run_in_threadpool

from weighbridge.registry import hosts, observations, rollouts, schemas
from weighbridge.registry.api import pages, views
from weighbridge.registry.api.auth import Admin, Enroller, HostItself, Reader, own_host
from weighbridge.registry.api.context import Context, Ctx, Cursor, Limit, Wait
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.errors import Unavailable
from weighbridge.registry.models import Host

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/hosts", tags=["hosts"], route_class=Guarded)
HostId = Annotated[str, Path(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


@router.get("")
def list_hosts(ctx: Ctx, _: Reader, limit: Limit, after: Cursor = "") -> schemas.Page[schemas.Host]:
    """Every host by id, retired ones too, with what it should hold and what it says that it holds."""
    with ctx.db.read() as tx:
        rows = tx.scalars(select(Host).where(col(Host.id) > after).order_by(col(Host.id)).limit(limit)).all()
        items = views.hosts(tx, rows, ctx.settings.silent_seconds)
    return pages.page(items, [row.id for row in rows], limit=limit, most_bytes=ctx.settings.page_bytes)


@router.get("/{host_id}")
def get_host(ctx: Ctx, _: Reader, host_id: HostId) -> schemas.Host:
    with ctx.db.read() as tx:
        return views.hosts(tx, [hosts.get(tx, host_id)], ctx.settings.silent_seconds)[0]


@router.post("", status_code=201)
def enrol(ctx: Ctx, who: Enroller, wanted: schemas.Enrolment) -> schemas.Enrolled:
    """Register a host or its newest process; a one-time token is exchanged for the host's own."""
    with ctx.change("jobs") as tx:
        enrolled = hosts.enrol(tx, wanted, who)
    try:
        # Not in one transaction: rollouts lock their row before hosts', and the token above is used up for good.
        with ctx.change("hosts") as tx:
            rollouts.converge_champion(tx)
    except Unavailable as error:
        logger.warning("host %s learns what to serve at the next reconcile: %s", enrolled.id, error)
    return enrolled


@router.get("/{host_id}/desired")
async def desired(
    ctx: Ctx, who: HostItself, host_id: HostId, after: Annotated[int, Query(ge=-1)] = -1, wait: Wait = 0.0
) -> schemas.Desired:
    """What the host should hold: at once when its revision is over `after`, at the latest after `wait` seconds."""
    own_host(who, host_id)
    found = await run_in_threadpool(_desired, ctx, host_id)
    if found.revision > after or not await ctx.pulse.wait(lambda now: now.revisions.get(host_id, 0) > after, wait):
        return found
    return await run_in_threadpool(_desired, ctx, host_id)


def _desired(ctx: Context, host_id: str) -> schemas.Desired:
    with ctx.db.read() as tx:
        return hosts.desired(tx, host_id)


@router.put("/{host_id}/observed", status_code=204)
def observed(ctx: Ctx, who: HostItself, host_id: HostId, report: schemas.Observed) -> None:
    """What the host holds, whole. The same report twice counts once."""
    own_host(who, host_id)
    with ctx.db.transaction() as tx:
        woken = observations.observe(tx, host_id, report)
    if woken:
        ctx.notifier.ring("jobs")


@router.post("/{host_id}/retire")
def retire(ctx: Ctx, who: Admin, host_id: HostId, decision: schemas.Decision) -> schemas.Host:
    """Take a host out for good: its assignments and its tokens end. 409 for the last one that serves a model."""
    by, silent = who.name, ctx.settings.silent_seconds
    with ctx.change("jobs", "hosts") as tx:
        row = hosts.retire(tx, host_id, actor=by, reason=decision.reason, force=decision.force, silent_seconds=silent)
        return views.hosts(tx, [row], silent)[0]
