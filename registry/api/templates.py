"""Templates: the programs that administrators registered. The registry keeps their bytes and never loads them."""

from __future__ import annotations

from fastapi import APIRouter

from weighbridge.registry import schemas, templates
from weighbridge.registry.api import views
from weighbridge.registry.api.auth import Admin, Reader, actor
from weighbridge.registry.api.context import Ctx, Cursor, Limit, Name
from weighbridge.registry.errors import Invalid

router = APIRouter(prefix="/v1/templates", tags=["templates"])


@router.get("")
def list_templates(ctx: Ctx, _: Reader, limit: Limit, after: Cursor = "") -> schemas.Page[schemas.Template]:
    with ctx.db.read() as tx:
        rows = templates.listing(tx, after=after, limit=limit)
    items = [schemas.Template(**views.fields(row)) for row in rows]
    return schemas.Page(items=items, next=items[-1].name if len(items) == limit else None)


@router.get("/{name}")
def get_template(ctx: Ctx, _: Reader, name: Name) -> schemas.Template:
    with ctx.db.read() as tx:
        return schemas.Template(**views.fields(templates.get(tx, name)))


@router.post("", status_code=201)
def add_template(ctx: Ctx, who: Admin, new: schemas.NewTemplate) -> schemas.Template:
    """Register a `.pt2` that was uploaded (PUT /v1/blobs/{digest}); versions that wait for one are judged again."""
    if not ctx.blobs.exists(new.digest):
        raise Invalid(f"blob {new.digest} is not there: upload the template's file first (PUT /v1/blobs/{new.digest})")
    with ctx.change("jobs") as tx:
        row = templates.add(tx, **new.model_dump(), actor=actor(who))
        tx.flush()
        tx.refresh(row)
        return schemas.Template(**views.fields(row))
