"""Templates: the programs that administrators registered. The registry keeps their bytes and never loads them."""

from __future__ import annotations

from fastapi import APIRouter

from weighbridge.registry import schemas, templates
from weighbridge.registry.api import pages, views
from weighbridge.registry.api.auth import Admin, Reader
from weighbridge.registry.api.context import Ctx, Cursor, Limit, Name
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.errors import Invalid
from weighbridge.registry.template_schemas import NewTemplate
from weighbridge.storage.errors import DigestMismatch, ObjectNotFound

router = APIRouter(prefix="/v1/templates", tags=["templates"], route_class=Guarded)


@router.get("")
def list_templates(ctx: Ctx, _: Reader, limit: Limit, after: Cursor = "") -> schemas.Page[schemas.Template]:
    with ctx.db.read() as tx:
        rows = templates.listing(tx, after=after, limit=limit)
    items = views.templates(rows)
    return pages.page(items, [item.name for item in items], limit=limit, most_bytes=ctx.settings.page_bytes)


@router.get("/{name}")
def get_template(ctx: Ctx, _: Reader, name: Name) -> schemas.Template:
    with ctx.db.read() as tx:
        return views.templates([templates.get(tx, name)])[0]


@router.post("", status_code=201)
def add_template(ctx: Ctx, who: Admin, new: NewTemplate) -> schemas.Template:
    """Register a `.pt2` that was uploaded (PUT /v1/blobs/{digest}); versions that wait for one are judged again.

    422 names the field and the rule of what workers could not read later, or a file that is not there, or damaged.
    """
    try:
        ctx.blobs.verify(new.digest)
    except (ObjectNotFound, DigestMismatch) as wrong:
        damaged = f"is damaged ({wrong})" if isinstance(wrong, DigestMismatch) else "is not there"
        upload = f"upload the template's file first (PUT /v1/blobs/{new.digest})"
        raise Invalid(f"blob {new.digest} {damaged}: {upload}") from wrong
    with ctx.change("jobs") as tx:
        row = templates.add(tx, **new.model_dump(mode="json"), actor=who.name)
        tx.flush()
        tx.refresh(row)
        return views.templates([row])[0]
