"""NaN and infinities that belong where they are: a causal mask of −inf that the operator's own program holds."""

from __future__ import annotations

import torch
from blake3 import blake3


def digest(tensor: torch.Tensor) -> str | None:
    """BLAKE3 (hex) of where a tensor is not finite and of what stands there; None where all of it is finite.

    The same in every floating dtype. NaN are all one.
    """
    if not tensor.is_floating_point():
        return None
    values = tensor.detach().reshape(-1)
    at = torch.isfinite(values).logical_not().nonzero().reshape(-1)
    if not at.numel():
        return None
    kinds = torch.nan_to_num(values[at].sign(), nan=2.0).to(torch.int8)
    return blake3(at.cpu().numpy().tobytes() + kinds.cpu().numpy().tobytes()).hexdigest()
