"""Tokens: created, listed without their secret, revoked. Administrators only."""

from __future__ import annotations

from fastapi import APIRouter

from weighbridge.registry import hosts, schemas, tokens
from weighbridge.registry.api import pages, views
from weighbridge.registry.api.auth import Admin
from weighbridge.registry.api.context import Ctx, Limit, NumberCursor, RowId
from weighbridge.registry.api.routes import Guarded

router = APIRouter(prefix="/v1/tokens", tags=["tokens"], route_class=Guarded)


@router.get("")
def list_tokens(ctx: Ctx, _: Admin, limit: Limit, after: NumberCursor = None) -> schemas.Page[schemas.Token]:
    with ctx.db.read() as tx:
        items = views.tokens(tokens.listing(tx, before=after, limit=limit))
    return pages.page(items, [item.id for item in items], limit=limit, most_bytes=ctx.settings.page_bytes)


@router.post("", status_code=201)
def create_token(ctx: Ctx, who: Admin, wish: schemas.TokenWish) -> schemas.NewToken:
    with ctx.change() as tx:
        return schemas.NewToken(token=tokens.create(tx, wish.role, wish.name, wish.ttl, wish.host_id, actor=who.name))


@router.delete("/{token_id}", status_code=204)
def revoke_token(ctx: Ctx, who: Admin, token_id: RowId, force: bool = False) -> None:
    """End it at once; 409 for the token of a host that serves, unless that is forced."""
    with ctx.change() as tx:
        if not force:
            hosts.prove_idle(tx, token_id, ctx.settings.silent_seconds)
        tokens.revoke(tx, token_id, actor=who.name)
