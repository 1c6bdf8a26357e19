"""The rows that say what became of each tensor; every method makes them with these."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from fnmatch import fnmatchcase

import torch

from weighbridge.registry.schemas import VariantTensor

KEPT = "kept"
"""The action of a tensor that is, bit for bit, the original's."""
SMALL = "a bias, a norm or a buffer"
"""The reason for keeping what no method of compression is for."""
_BLOCK = 1 << 22
"""Elements of one look."""


def sqnr(original: torch.Tensor, approximated: torch.Tensor) -> float | None:
    """Signal to quantization noise, 10 · log10(Σ x² / Σ (x − x̂)²), in dB.

    Of tensors of one shape. None: exact, empty, all zero, or integers.
    """
    if not original.is_floating_point() or original.shape != approximated.shape:
        return None
    signal = noise = 0.0
    ours, theirs = original.detach().reshape(-1), approximated.detach().reshape(-1)
    for start in range(0, ours.numel(), _BLOCK):
        wanted = ours[start : start + _BLOCK].to("cpu", torch.float32)
        got = theirs[start : start + _BLOCK].to("cpu", torch.float32)
        signal += float(wanted.square().sum(dtype=torch.float64))
        noise += float((wanted - got).square().sum(dtype=torch.float64))
    ratio = signal / noise if noise else 0.0
    return round(10 * math.log10(ratio), 2) if ratio > 0 and math.isfinite(ratio) else None


def kept(name: str, value: torch.Tensor, reason: str = "") -> VariantTensor:
    """The row of a tensor that stays. Without a reason: SMALL for what is no matrix, else nothing is for it."""
    why = reason or (SMALL if value.dim() < 2 else "no linear layer's weight")
    return VariantTensor(name=name, action=KEPT, reason=why, bytes_in=value.nbytes, bytes_out=value.nbytes)


def changed(
    name: str,
    action: str,
    original: torch.Tensor,
    approximated: torch.Tensor | None,
    *,
    bytes_out: int,
    reason: str = "",
) -> VariantTensor:
    """The row of a tensor that became another; `approximated` is it again in the original's shape, where it has one."""
    return VariantTensor(
        name=name,
        action=action,
        reason=reason,
        bytes_in=original.nbytes,
        bytes_out=bytes_out,
        sqnr=None if approximated is None else sqnr(original, approximated),
    )


def skipped(name: str, patterns: Sequence[str]) -> str | None:
    """The pattern of the wish's `skip` that a layer or one of its tensors matches (`lm_head`, `*.0`, `fc.weight`)."""
    layer = name.rpartition(".")[0]
    return next((one for one in patterns if fnmatchcase(name, one) or fnmatchcase(layer, one)), None)


def kept_layers(rows: Sequence[VariantTensor], matrices: Container[str]) -> list[str]:
    """Those of the `matrices` (tensors of two dimensions and more) that stay: `head.weight: skipped by head`."""
    return [f"{row.name}: {row.reason}" for row in rows if row.action == KEPT and row.name in matrices]
