"""Unstructured pruning by magnitude or Wanda, and 2:4 sparsity: weights become zero where they matter least.

Wanda (Sun et al., arXiv 2306.11695): |weight| · ‖its input‖₂, compared within each output row. An input channel of a
convolution has one norm over all its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from weighbridge.engines.binding import normal_name
from weighbridge.engines.manifest import Encoding
from weighbridge.registry.recipe import VariantWish
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression import activations, recovery, reference, report
from weighbridge.workers.compression.activations import Layer, Seen
from weighbridge.workers.compression.casting import ENGINE
from weighbridge.workers.compression.types import Built, NotApplicable, Order

CALIBRATION_BATCH = 32
"""Rows of one run of the calibration data."""
_KERNEL_ROWS, _KERNEL_COLUMNS = 32, 64
"""CUDA's 2:4 kernels take multiples of these, in FP16 and BF16."""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Plan:
    """By parameter: which weights stay (True), or why all do."""

    masks: dict[str, torch.Tensor]
    kept: dict[str, str]


def build(order: Order) -> Built:
    """Prune by the wish's method. Raises NotApplicable where nothing can be pruned, or without CUDA for sparse-2-4."""
    device = order.original.device
    require_torch(order)
    if order.wish.method == "sparse-2-4" and not device.startswith("cuda"):
        raise NotApplicable(f"its kernels are CUDA's; this worker's device is {device}")
    return prune(order)


def prune(order: Order) -> Built:
    """`build` without the question for a device: the weights are the same everywhere."""
    wish, original = order.wish, order.original
    module = reference.open_module(original)
    calibrated = wish.method == "prune-wanda" or (wish.method == "sparse-2-4" and order.data.origin != "synthetic")
    seen = look(module, order, wish.calibration_rows if calibrated else 2)
    plan = _plan(module, seen, wish, calibrated)
    if not plan.masks:
        reasons = "; ".join(islice((f"{name}: {reason}" for name, reason in plan.kept.items()), 4))
        raise NotApplicable(f"there is no weight to prune ({reasons})")
    notes = ["the zeros are stored: no smaller, and no faster until 90% and more"] if not _is_2_4(wish) else []
    if calibrated:
        notes.append(f"calibrated on {wish.calibration_rows} rows of {order.data.origin} inputs")
    trained: Mapping[str, torch.Tensor] = {}
    if wish.recover is not None:
        frozen = frozenset(name for name in module.state_dict() if skipped(name, wish))
        notes.append(recovery.recover(recovery.Student(module, plan.masks, frozen), order))
        trained = module.state_dict()
    files, rows = _write(order, plan, trained)
    return Built(
        files=files,
        tensors=rows,
        engine=ENGINE,
        encoding=Encoding(kind="semi_structured") if _is_2_4(wish) else None,
        promised_ratio=_ratio(rows) if _is_2_4(wish) else 1.0,
        notes=tuple(notes),
        calibration=order.data.origin if calibrated else None,
    )


def require_torch(order: Order) -> None:
    """Raise NotApplicable for an original whose program is not torch's."""
    if order.original.manifest.engine.get("name", "torch") != "torch":
        raise NotApplicable("the original is no torch program")


def look(module: nn.Module, order: Order, rows: int) -> Seen:
    """Watch the module on so many rows of the order's data."""
    original = order.original
    batches = order.data.batches(rows, min(rows, CALIBRATION_BATCH))
    return activations.watch(module, original.manifest.inputs, batches, original.device)


def skipped(parameter: str, wish: VariantWish) -> str | None:
    """The pattern of the wish's `skip` that names the parameter, or its layer."""
    return report.skipped(normal_name(parameter), wish.skip)


def _is_2_4(wish: VariantWish) -> bool:
    return wish.method == "sparse-2-4"


def _plan(module: nn.Module, seen: Seen, wish: VariantWish, calibrated: bool) -> _Plan:
    plan = _Plan({}, {})
    for name, weight in module.state_dict().items():
        reason = _reason(name, weight, seen, wish)
        if reason is not None:
            plan.kept[name] = reason
        else:
            plan.masks[name] = _mask(weight, seen.layers[name], wish, calibrated)
    return plan


def _reason(name: str, weight: torch.Tensor, seen: Seen, wish: VariantWish) -> str | None:
    """Why a parameter stays as it is; None: it is pruned."""
    if weight.ndim < 2 or not weight.is_floating_point():
        return report.SMALL
    if name in seen.embeddings:
        return "an embedding" + (" too" if name in seen.layers else "")
    if name not in seen.layers:
        return "not seen as the weight of a linear layer or convolution"
    if pattern := skipped(name, wish):
        return f"skipped by {pattern}"
    if not _is_2_4(wish):
        return None
    if seen.layers[name].kind != "linear":
        return "2:4 is for linear layers"
    if weight.shape[0] % _KERNEL_ROWS or weight.shape[1] % _KERNEL_COLUMNS:
        shape = "×".join(map(str, weight.shape))
        return f"{shape} is not made of {_KERNEL_ROWS}×{_KERNEL_COLUMNS}, which 2:4 kernels ask for"
    return None


def _mask(weight: torch.Tensor, layer: Layer, wish: VariantWish, calibrated: bool) -> torch.Tensor:
    scores = weight.detach().float().abs()
    if calibrated:
        scores = scores * _by_input(layer, weight)
    if _is_2_4(wish):
        return highest(scores.reshape(-1, 4), 2).reshape(weight.shape)
    rows = scores.flatten(1) if calibrated else scores.reshape(1, -1)
    return highest(rows, rows.shape[1] - round(rows.shape[1] * wish.sparsity)).reshape(weight.shape)


def _by_input(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """The norm of the input that each weight meets, to multiply with: (1 or out, in, 1 …)."""
    norms = layer.norms.reshape(layer.groups, -1)
    norms = norms.repeat_interleave(weight.shape[0] // layer.groups, dim=0) if layer.groups > 1 else norms
    return norms.reshape(*norms.shape, *[1] * (weight.ndim - 2))


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` highest scores of each row, (rows, columns)."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(count, dim=1).indices, True)


def _write(
    order: Order, plan: _Plan, trained: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Path], tuple[VariantTensor, ...]]:
    """File by file, under the original's names; what was not changed keeps its bytes."""
    files, rows = {}, []
    for file in order.original.manifest.files:
        if not file.path.endswith(".safetensors"):
            continue
        source, target = order.original.cache(file.digest), order.folder / "weights" / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with safe_open(source, "pt") as opened:
            metadata = opened.metadata()
        changed = {}
        for tensor, value in load_file(source).items():
            changed[tensor], row = _tensor(order, plan, trained, tensor, value)
            rows.append(row)
        save_file(changed, target, metadata)
        files[file.path] = target
    return files, tuple(sorted(rows, key=lambda row: row.name))


def _tensor(
    order: Order, plan: _Plan, trained: Mapping[str, torch.Tensor], tensor: str, value: torch.Tensor
) -> tuple[torch.Tensor, VariantTensor]:
    """(what becomes of it, its row)."""
    parameter = order.original.manifest.binding[tensor]
    mask = plan.masks.get(parameter)
    new = trained[parameter].detach().cpu() if parameter in trained else value
    new = new.to(_dtype(value, order.wish)).contiguous()
    if mask is not None:
        new = new.where(mask.cpu(), 0.0)
        zeros = 1 - new.count_nonzero().item() / new.numel()
        reason = "2 of each 4 along the inputs" if _is_2_4(order.wish) else ""
        return new, report.changed(tensor, f"pruned {zeros:.0%}", value, new, bytes_out=new.nbytes, reason=reason)
    reason = plan.kept.get(parameter, "")
    if torch.equal(new, value.to(new.dtype)):
        if new.dtype is value.dtype:
            return new, report.kept(tensor, value, reason)
        return new, report.changed(tensor, "cast", value, new, bytes_out=new.nbytes, reason=reason)
    return new, report.changed(tensor, "fine-tuned", value, new, bytes_out=new.nbytes, reason=reason)


def _dtype(value: torch.Tensor, wish: VariantWish) -> torch.dtype:
    """2:4 kernels take FP16 and BF16: what is wider becomes BF16, everywhere, so that the program has one dtype."""
    if _is_2_4(wish) and value.is_floating_point() and value.dtype not in _HALF:
        return torch.bfloat16
    return value.dtype


def _ratio(rows: tuple[VariantTensor, ...]) -> float:
    return sum(row.bytes_out for row in rows) / max(1, sum(row.bytes_in for row in rows))
