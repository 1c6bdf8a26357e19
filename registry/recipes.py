"""Recipe revisions: what was read beside the checkpoints, merged with the operator's policy, pinned by versions."""

from __future__ import annotations

from sqlalchemy import select
from sqlmodel import col

from weighbridge.registry import catalog, events
from weighbridge.registry.db import Session, insert_or_skip
from weighbridge.registry.models import Recipe
from weighbridge.registry.recipe import Policy, effective, parse, revision_digest

_READER = "recipe.yaml"


def pin(tx: Session, model_name: str, text: str | None, policy: Policy) -> Recipe:
    """Return the revision for this text (None: there is no recipe) under this policy, written when it is new.

    What the policy overrules is reported as an event, once a revision. Raises InvalidRecipe.
    """
    digest = revision_digest(text, policy)
    model = catalog.ensure(tx, model_name, actor=_READER)
    assert model.id is not None
    known = select(Recipe).where(col(Recipe.model_id) == model.id, col(Recipe.digest) == digest)
    if (there := tx.scalars(known).one_or_none()) is not None:
        return there
    judge, ignored = effective(None if text is None else parse(text), policy)
    row = insert_or_skip(
        tx,
        Recipe(
            model_id=model.id,
            digest=digest,
            text=text,
            effective=judge.model_dump(mode="json"),
            ignored=ignored,
        ),
    )
    if row is None:
        return tx.scalars(known).one()
    subject = f"recipe:{row.id}"
    events.record(tx, "recipe.changed", model=model_name, subject=subject, after={"digest": digest}, actor=_READER)
    if ignored:
        events.record(
            tx,
            "recipe.overruled",
            model=model_name,
            subject=subject,
            after={"ignored": ignored},
            actor="policy",
            reason="; ".join(ignored),
        )
    return row
