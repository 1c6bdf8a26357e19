"""Give a loaded program other weights of the same shapes and sizes, to learn what a proof can tell apart."""

from __future__ import annotations

import torch
from torch import nn

BUDGET = 32 << 20
"""Bytes of new weights: a program is not copied whole where it is large."""
_GOLDEN = 0.381966
_LARGER = 1.25
"""A program that sums a weight up would not see its values move."""


def replace_weights(module: nn.Module, turn: int = 0, budget: int = BUDGET) -> tuple[int, int]:
    """Move every floating weight's values to other places in it and make them larger, from the last layer to the first.

    What is one value throughout becomes another. Each `turn` gives others. The tensors that were given are left as they
    are (files may be mapped into them); constants that are no weights stay. Returns how many of how many tensors
    changed: what would go beyond the budget does not.
    """
    kept = module.state_dict().keys()
    named = [*module.named_parameters(), *((name, one) for name, one in module.named_buffers() if name in kept)]
    weights = [one for _, one in named if one.is_floating_point() and one.numel()]
    changed = 0
    for weight in reversed(weights):
        if (size := weight.numel() * weight.element_size()) <= budget:
            budget, changed = budget - size, changed + 1
            weight.data = _other(weight.detach(), turn)
    return changed, len(weights)


def _other(weight: torch.Tensor, turn: int) -> torch.Tensor:
    flat = weight.reshape(-1)
    turned = (flat.flip(0) if turn % 2 else flat).roll(round(_GOLDEN * len(flat)) + 1 + turn)
    if torch.equal(turned, flat):
        return (flat * 1.7 + 0.3 * (turn + 1)).view(weight.shape)  # positive stays positive: it may be a variance
    return (turned * _LARGER).view(weight.shape)
