"""What happens and what waits: the event feed, checkpoints, status, policies."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import func, select
from sqlmodel import SQLModel, col
from starlette.concurrency import run_in_threadpool

from weighbridge import __version__, limits
from weighbridge.registry import checkpoints, events, hosts, presence, rollouts, schemas, versions
from weighbridge.registry.api import pages, views
from weighbridge.registry.api.auth import Reader
from weighbridge.registry.api.context import Context, Ctx, Limit, ModelFilter, NumberCursor, Wait
from weighbridge.registry.api.pulse import Condition
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.db import Session
from weighbridge.registry.lifecycle import CheckpointState
from weighbridge.registry.models import Checkpoint, Job, Model, Version

router = APIRouter(prefix="/v1", tags=["feed"], route_class=Guarded)
_OPEN = (CheckpointState.WAITING, CheckpointState.REFUSED)
_SHOWN = 100


@router.get("/events")
async def list_events(
    ctx: Ctx,
    _: Reader,
    limit: Limit,
    after: NumberCursor = None,
    wait: Wait = 0.0,
    model: ModelFilter = None,
    kind: Annotated[list[limits.Id] | None, Query(max_length=100)] = None,
) -> schemas.Page[schemas.Event]:
    """Events behind `after` (absent: from now on), in order. `next` is always there: it is where to go on.

    With `wait`, an empty page is held back until something comes or the seconds are over.
    """
    until = asyncio.get_running_loop().time() + wait
    cursor = await run_in_threadpool(_last, ctx) if after is None else after
    while True:
        items, cursor = await run_in_threadpool(_read, ctx, cursor, limit, model, kind)
        left = until - asyncio.get_running_loop().time()
        if items or not await ctx.pulse.wait(_behind(cursor), left):
            return schemas.Page(items=items, next=str(cursor))


def _behind(cursor: int) -> Condition:
    return lambda seen: seen.seq > cursor


def _last(ctx: Context) -> int:
    ctx.pulse.sequence()
    with ctx.db.read() as tx:
        return events.last(tx)


def _read(
    ctx: Context, after: int, limit: int, model: str | None, kinds: list[str] | None
) -> tuple[list[schemas.Event], int]:
    """The next events that match, and the number up to which nothing else does."""
    ctx.pulse.sequence()
    with ctx.db.read() as tx:
        last = events.last(tx)  # First: every event up to it is there when the next query looks.
        rows = events.read(tx, after, limit, model, kinds)
    items = pages.fitting([schemas.Event(**views.fields(row)) for row in rows], ctx.settings.page_bytes)
    if len(items) == limit or len(items) < len(rows):
        return items, items[-1].seq
    return items, max(after, last, items[-1].seq if items else 0)


@router.get("/checkpoints")
def list_checkpoints(
    ctx: Ctx,
    _: Reader,
    limit: Limit,
    model: ModelFilter = None,
    state: CheckpointState | None = None,
    path: Annotated[str | None, Query(max_length=limits.PATH)] = None,
    after: NumberCursor = None,
) -> schemas.Page[schemas.Checkpoint]:
    """What lies in the bucket and is no version (yet), newest first; `state=complete` for those that are."""
    with ctx.db.read() as tx:
        rows = _checkpoints(tx, limit, model=model, state=state, path=path, before=after)
    cursors, items = [number for number, _ in rows], [view for _, view in rows]
    return pages.page(items, cursors, limit=limit, most_bytes=ctx.settings.page_bytes)


def _checkpoints(
    tx: Session,
    limit: int,
    *,
    model: str | None = None,
    state: str | None = None,
    path: str | None = None,
    before: int | None = None,
) -> list[tuple[int | None, schemas.Checkpoint]]:
    found = select(Checkpoint).where(col(Checkpoint.state).in_([state] if state else _OPEN))
    if model is not None:
        found = found.where(col(Checkpoint.model) == model)
    if path is not None:
        found = found.where(col(Checkpoint.path) == path)
    if before is not None:
        found = found.where(col(Checkpoint.id) < before)
    rows = tx.scalars(found.order_by(col(Checkpoint.id).desc()).limit(limit))
    return [(row.id, schemas.Checkpoint(**views.fields(row))) for row in rows]


@router.get("/status")
def get_status(ctx: Ctx, _: Reader) -> schemas.Status:
    """What goes on and what waits."""
    with ctx.db.read() as tx:
        return schemas.Status(
            version=__version__,
            models=tx.execute(select(func.count()).select_from(Model)).scalar_one(),
            versions=_counts(tx, Version, col(Version.status)),
            jobs=_counts(tx, Job, col(Job.state)),
            waiting=[view for _, view in _checkpoints(tx, _SHOWN)],
            open_checkpoints=checkpoints.count_open(tx),
            set_aside=_set_aside(tx),
            rollouts=views.rollout_list(tx, rollouts.listing(tx, going=True, limit=_SHOWN)),
            hosts=hosts.count(tx),
            silent=views.silent_hosts(tx, ctx.settings.silent_seconds),
            away=[schemas.StoreAway(**asdict(one) | {"since": views.at(one.since)}) for one in presence.away(tx)],
            daemon_silent_seconds=presence.daemon_silent(tx),
            last_seq=events.last(tx),
        )


def _set_aside(tx: Session) -> list[schemas.SetAside]:
    columns = (col(Model.name), col(Version.number), col(Version.path), col(Version.reason))
    found = select(*columns).join(Model, col(Model.id) == col(Version.model_id)).where(versions.set_aside())
    rows = tx.execute(found.order_by(col(Version.id).desc()).limit(_SHOWN))
    return [schemas.SetAside(model=row[0], number=row[1], path=row[2], reason=row[3]) for row in rows]


def _counts(tx: Session, table: type[SQLModel], column: Any) -> dict[str, int]:
    rows = tx.execute(select(column, func.count()).select_from(table).group_by(column).order_by(column))
    return {row[0]: row[1] for row in rows}


@router.get("/policies")
def list_policies(ctx: Ctx, _: Reader) -> list[dict[str, Any]]:
    """The operator's policies in the order in which they are matched: what no recipe weakens."""
    return [policy.model_dump(mode="json") for policy in ctx.policies]
