"""Where checkpoints are dropped, for those who publish: never what the registry itself opens the store with."""

from __future__ import annotations

from fastapi import APIRouter

from weighbridge.registry import schemas
from weighbridge.registry.api.auth import Publisher
from weighbridge.registry.api.context import Ctx
from weighbridge.registry.api.routes import Guarded
from weighbridge.registry.errors import NotFound

router = APIRouter(prefix="/v1", tags=["store"], route_class=Guarded)


@router.get("/store")
async def get_store(ctx: Ctx, _: Publisher) -> schemas.StoreAddress:
    """The watched store's address. Credentials are the publisher's own."""
    if ctx.store is None:
        raise NotFound("store that publishers can reach of", "this registry")
    return ctx.store
