"""What a policy lets a recipe, or a checkpoint, take of the operator's machines: a recipe chooses no resources.

A wish above a cap is cut to it, and said to be (`recipe_ignored` of the version, the event `recipe.overruled`): a model
whose recipe asks for too much is still weighed. Only a shape cannot be cut; it makes the recipe invalid.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from weighbridge.registry.errors import InvalidRecipe

if TYPE_CHECKING:
    from weighbridge.registry.recipe import Recipe, VariantWish


class Caps(BaseModel):
    """Fields of every policy. The defaults are what one ordinary machine bears."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_checkpoint_bytes: int = Field(default=500_000_000_000, ge=1)
    """A larger checkpoint is rejected before anything of it is read."""
    max_variants: int = Field(default=16, ge=0)
    max_ranks: int = Field(default=2, ge=1)
    """Of `recover`: processes of one torchrun."""
    max_steps: int = Field(default=10_000, ge=1)
    max_batch: int = Field(default=4096, ge=1)
    """Rows of one step of `recover`."""
    max_calibration_rows: int = Field(default=4096, ge=1)
    max_seconds: float = Field(default=3600.0, gt=0, le=7 * 86400)
    """How long one job of a model may take."""
    max_elements: int = Field(default=1 << 26, ge=1)
    """Numbers in one row of an input or output that the recipe of a factory names."""


def within(recipe: Recipe, caps: Caps) -> tuple[Recipe, list[str]]:
    """The recipe within the caps, and in words what was cut. Raises InvalidRecipe for a shape beyond them."""
    _check_shapes(recipe, caps)
    ignored: list[str] = []
    kept = recipe.variants[: caps.max_variants]
    if left := recipe.variants[caps.max_variants :]:
        names = ", ".join(wish.name for wish in left)
        ignored.append(f"variants: {names}: overruled by the policy (max_variants = {caps.max_variants})")
    return recipe.model_copy(update={"variants": tuple(_wish(wish, caps, ignored) for wish in kept)}), ignored


def _wish(wish: VariantWish, caps: Caps, ignored: list[str]) -> VariantWish:
    where = f"variants.{wish.name}"
    changes: dict[str, Any] = _lower(wish, {"calibration_rows": "max_calibration_rows"}, caps, where, ignored)
    if wish.recover is not None:
        bounds = {"ranks": "max_ranks", "steps": "max_steps", "batch": "max_batch"}
        lower = _lower(wish.recover, bounds, caps, f"{where}.recover", ignored)
        changes["recover"] = wish.recover.model_copy(update=lower)
    return wish.model_copy(update=changes)


def _lower(wish: BaseModel, bounds: dict[str, str], caps: Caps, where: str, ignored: list[str]) -> dict[str, Any]:
    """The fields that are above their caps, at their caps; a default that is cut is nobody's wish."""
    found: dict[str, Any] = {}
    for field, cap in bounds.items():
        asked, most = getattr(wish, field), getattr(caps, cap)
        if asked > most:
            found[field] = most
            if field in wish.model_fields_set:
                ignored.append(f"{where}.{field}: {asked} is overruled by the policy ({cap} = {most})")
    return found


def _check_shapes(recipe: Recipe, caps: Caps) -> None:
    for kind, wishes in (("inputs", recipe.inputs), ("outputs", recipe.outputs)):
        for wish in wishes:
            count = math.prod(length for length in wish.shape if length > 0)
            if count > caps.max_elements:
                rule = f"the policy allows {caps.max_elements:,} (max_elements)"
                raise InvalidRecipe(f"recipe.yaml: {kind}.{wish.name}: {count:,} numbers a row; {rule}")
