"""Versions: listed, one whole, judged anew, put away."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Response
from sqlalchemy import select
from sqlmodel import col

from weighbridge import limits
from weighbridge.registry import archiving, schemas, versions
from weighbridge.registry.api import pages, views
from weighbridge.registry.api.auth import Approver, Publisher, Reader
from weighbridge.registry.api.context import Ctx, Limit, ModelFilter, ModelName, NumberCursor, Selector
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.lifecycle import VersionStatus
from weighbridge.registry.models import Model, Version

router = APIRouter(prefix="/v1", tags=["versions"], route_class=Guarded)


@router.get("/versions")
def list_versions(
    ctx: Ctx,
    _: Reader,
    limit: Limit,
    model: ModelFilter = None,
    status: VersionStatus | None = None,
    path: Annotated[limits.Text | None, Query(max_length=limits.PATH)] = None,
    after: NumberCursor = None,
) -> schemas.Page[schemas.Version]:
    """Newest first; of one model, one status, one checkpoint path."""
    found = select(Version).order_by(col(Version.id).desc()).limit(limit)
    if model is not None:
        found = found.join(Model, col(Model.id) == col(Version.model_id)).where(col(Model.name) == model)
    if status is not None:
        found = found.where(col(Version.status) == status)
    if path is not None:
        found = found.where(col(Version.path) == path)
    if after is not None:
        found = found.where(col(Version.id) < after)
    with ctx.db.read() as tx:
        rows = tx.scalars(found).all()
        items = views.version_list(tx, rows)
    return pages.page(items, [row.id for row in rows], limit=limit, most_bytes=ctx.settings.page_bytes)


@router.get("/models/{model}/versions/{selector}")
def get_version(ctx: Ctx, _: Reader, model: ModelName, selector: Selector, response: Response) -> schemas.VersionDetail:
    with ctx.db.read() as tx:
        found = views.version_detail(tx, versions.get(tx, model, selector))
    response.headers["etag"] = f'"{found.revision}"'
    return found


@router.post("/models/{model}/versions/{selector}/rejudge")
def rejudge(
    ctx: Ctx, who: Publisher, model: ModelName, selector: Selector, decision: schemas.Decision
) -> schemas.VersionDetail:
    """Judge an ended version by the recipe and evaluation set that lie there now, under today's policy."""
    with ctx.change("jobs") as tx:
        version = versions.get(tx, model, selector)
        versions.rejudge(tx, model, version.number, actor=who.name, reason=decision.reason)
        return views.version_detail(tx, version)


@router.get("/models/{model}/versions/{selector}/archive")
def loss(ctx: Ctx, _: Approver, model: ModelName, selector: Selector) -> schemas.Loss:
    """What archiving it would take from whom. Changes nothing."""
    with ctx.db.transaction() as tx:
        lost = archiving.loss(tx, model, selector)
    return schemas.Loss(**asdict(lost), leaves_nothing=lost.leaves_nothing)


@router.post("/models/{model}/versions/{selector}/archive")
def archive(
    ctx: Ctx, who: Approver, model: ModelName, selector: Selector, decision: schemas.Decision
) -> schemas.VersionDetail:
    """Put a version away; a fleet that serves it goes back, and 409 where there is nothing to go back to."""
    by, why = who.name, decision.reason
    with ctx.change("jobs", "hosts") as tx:
        version, _ = archiving.archive(tx, model, selector, actor=by, reason=why, force=decision.force)
        return views.version_detail(tx, version)


@router.post("/models/{model}/versions/{selector}/unarchive")
def unarchive(
    ctx: Ctx, who: Approver, model: ModelName, selector: Selector, decision: schemas.Decision
) -> schemas.VersionDetail:
    """Give an archived version back the status that it had, while its blobs are still there."""
    by, why = who.name, decision.reason
    with ctx.change("jobs", "hosts") as tx:
        version = archiving.unarchive(tx, model, selector, ctx.blobs.exists, actor=by, reason=why)
        return views.version_detail(tx, version)
