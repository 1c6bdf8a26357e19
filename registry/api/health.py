"""Health, for orchestrators: the only routes without a token, and they tell nothing but that."""

from __future__ import annotations

from fastapi import APIRouter

from weighbridge.registry.api.context import Ctx
from weighbridge.registry.api.routes import Guarded

router = APIRouter(tags=["health"], route_class=Guarded)


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(ctx: Ctx) -> dict[str, str]:
    """The database and the artifact store answer too; 503 otherwise."""
    ctx.db.check()
    ctx.blobs.store.check()
    return {"status": "ok"}
