"""How a rollout moves its fleet: what the version's recipe says, what a person overrides, within the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from weighbridge.registry import stored
from weighbridge.registry.db import Session
from weighbridge.registry.errors import Invalid, broken_rules
from weighbridge.registry.models import Recipe as RecipeRow
from weighbridge.registry.models import Version
from weighbridge.registry.recipe import Policy, Recipe, RolloutSettings, effective


def of(tx: Session, version: Version, policy: Policy) -> RolloutSettings:
    """The rollout part of the recipe that the version pins, under today's policy. Raises Unreadable."""
    row = tx.get(RecipeRow, version.recipe_id) if version.recipe_id is not None else None
    what = f"the recipe of version {version.number}"
    recipe = stored.parse(Recipe, row.effective, what) if row is not None else None
    return effective(recipe, policy)[0].rollout


def overridden(base: RolloutSettings, wishes: Mapping[str, Any], policy: Policy) -> RolloutSettings:
    """What a person wishes for one rollout, in place of the recipe's.

    Raises Invalid: a setting that is unknown, wrong, or that the policy overrules.
    """
    try:
        wished = RolloutSettings.model_validate({**base.model_dump(), **wishes})
    except ValidationError as exc:
        raise Invalid(f"rollout settings: {broken_rules(exc)}") from exc
    merged, ignored = effective(Recipe(rollout=wished), policy)
    refused = [line for line in ignored if line.removeprefix("rollout.").partition(":")[0] in wishes]
    if refused:
        raise Invalid("; ".join(refused))
    return merged.rollout
