"""Models, their aliases and tags."""

from __future__ import annotations

from fastapi import APIRouter, Response
from sqlalchemy import select
from sqlmodel import col

from weighbridge.registry import aliases, catalog, schemas, tags, versions
from weighbridge.registry.api import pages, views
from weighbridge.registry.api.auth import Approver, Publisher, Reader
from weighbridge.registry.api.context import Ctx, Cursor, Limit, ModelName, Name, Revision, Selector
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.models import Alias

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=Guarded)


@router.get("")
def list_models(ctx: Ctx, _: Reader, limit: Limit, after: Cursor = "") -> schemas.Page[schemas.Model]:
    with ctx.db.read() as tx:
        items = views.models(tx, catalog.page(tx, after=after, limit=limit))
    return pages.page(items, [item.name for item in items], limit=limit, most_bytes=ctx.settings.page_bytes)


@router.get("/{model}")
def get_model(ctx: Ctx, _: Reader, model: ModelName, response: Response) -> schemas.Model:
    with ctx.db.read() as tx:
        found = views.models(tx, [catalog.get(tx, model)])[0]
    response.headers["etag"] = f'"{found.revision}"'
    return found


@router.get("/{model}/aliases")
def list_aliases(
    ctx: Ctx, _: Reader, model: ModelName, limit: Limit, after: Cursor = ""
) -> schemas.Page[schemas.Alias]:
    with ctx.db.read() as tx:
        mine = select(Alias).where(col(Alias.model_id) == catalog.get(tx, model).id, col(Alias.name) > after)
        rows = tx.scalars(mine.order_by(col(Alias.name)).limit(limit)).all()
    items = [schemas.Alias(**row.model_dump()) for row in rows]
    return pages.page(items, [item.name for item in items], limit=limit, most_bytes=ctx.settings.page_bytes)


@router.put("/{model}/aliases/{alias}")
def set_alias(
    ctx: Ctx,
    who: Approver,
    model: ModelName,
    alias: Name,
    target: schemas.AliasTarget,
    revision: Revision,
    response: Response,
) -> schemas.Alias:
    with ctx.change() as tx:
        row = aliases.set_alias(tx, model, alias, target.version, actor=who.name, expected_revision=revision)
        tx.flush()
        tx.refresh(row)
        found = schemas.Alias(**row.model_dump())
    response.headers["etag"] = f'"{found.revision}"'
    return found


@router.delete("/{model}/aliases/{alias}", status_code=204)
def delete_alias(ctx: Ctx, who: Approver, model: ModelName, alias: Name, revision: Revision) -> None:
    with ctx.change() as tx:
        aliases.delete_alias(tx, model, alias, actor=who.name, expected_revision=revision)


@router.put("/{model}/tags/{key}", status_code=204)
def set_tag(ctx: Ctx, who: Publisher, model: ModelName, key: Name, tag: schemas.TagValue) -> None:
    with ctx.change() as tx:
        tags.set_tag(tx, model, 0, key, tag.value, actor=who.name)


@router.delete("/{model}/tags/{key}", status_code=204)
def delete_tag(ctx: Ctx, who: Publisher, model: ModelName, key: Name) -> None:
    with ctx.change() as tx:
        tags.delete_tag(tx, model, 0, key, actor=who.name)


@router.put("/{model}/versions/{selector}/tags/{key}", status_code=204)
def set_version_tag(
    ctx: Ctx, who: Publisher, model: ModelName, selector: Selector, key: Name, tag: schemas.TagValue
) -> None:
    with ctx.change() as tx:
        number = versions.get(tx, model, selector).number
        tags.set_tag(tx, model, number, key, tag.value, actor=who.name)


@router.delete("/{model}/versions/{selector}/tags/{key}", status_code=204)
def delete_version_tag(ctx: Ctx, who: Publisher, model: ModelName, selector: Selector, key: Name) -> None:
    with ctx.change() as tx:
        tags.delete_tag(tx, model, versions.get(tx, model, selector).number, key, actor=who.name)
