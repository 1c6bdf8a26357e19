"""Rollouts: listed, one with its steps, started by hand, decided."""

from __future__ import annotations

from fastapi import APIRouter

from weighbridge.registry import rollouts, schemas
from weighbridge.registry.api import pages, views
from weighbridge.registry.api.auth import Approver, Reader
from weighbridge.registry.api.context import Ctx, Limit, ModelFilter, NumberCursor, RowId
from weighbridge.registry.api.routes import Guarded

router = APIRouter(prefix="/v1/rollouts", tags=["rollouts"], route_class=Guarded)


@router.get("")
def list_rollouts(
    ctx: Ctx,
    _: Reader,
    limit: Limit,
    model: ModelFilter = None,
    going: bool = False,
    after: NumberCursor = None,
) -> schemas.Page[schemas.Rollout]:
    """Newest first, without their steps. `going`: only those that have not ended."""
    with ctx.db.read() as tx:
        items = views.rollout_list(tx, rollouts.listing(tx, model=model, going=going, before=after, limit=limit))
    return pages.page(items, [item.id for item in items], limit=limit, most_bytes=ctx.settings.page_bytes)


@router.get("/{rollout_id}")
def get_rollout(ctx: Ctx, _: Reader, rollout_id: RowId) -> schemas.Rollout:
    with ctx.db.read() as tx:
        return views.rollout_detail(tx, rollouts.find(tx, rollout_id))


@router.post("", status_code=201)
def start_rollout(ctx: Ctx, who: Approver, wanted: schemas.RolloutStart) -> schemas.Rollout:
    with ctx.change("jobs", "hosts") as tx:
        row = rollouts.start(
            tx,
            wanted.model,
            wanted.version,
            variant=wanted.variant,
            settings=wanted.settings,
            policies=ctx.policies,
            actor=who.name,
            reason=wanted.reason,
        )
        tx.flush()
        tx.refresh(row)
        return views.rollout_detail(tx, row)


@router.post("/{rollout_id}/{verb}")
def decide(
    ctx: Ctx, who: Approver, rollout_id: RowId, verb: rollouts.Verb, decision: schemas.Decision
) -> schemas.Rollout:
    """A person's pause, resume, abort, promote or approve; carried out by the rollout's next step."""
    with ctx.change("jobs", "hosts") as tx:
        by, why = who.name, decision.reason
        row = rollouts.decide(tx, rollout_id, verb, actor=by, reason=why, force=decision.force)
        tx.flush()
        tx.refresh(row)
        return views.rollout_detail(tx, row)
