"""prune-channels: the least important hidden channels are cut out, so that the tensors become smaller.

A cut needs a *pair*: a linear layer or convolution, then only operations that keep channels apart, then one linear
layer or convolution that takes the result, with no other use on the way. A channel matters by the L2 norm of the row
that makes it times that of the columns that read it; with calibration data by the norm of what arrives there times
that of the columns (Wanda's criterion for a whole column). The program's outputs are never cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import fx, nn

from weighbridge.engines import template
from weighbridge.engines.binding import bind
from weighbridge.engines.encodings import decode
from weighbridge.engines.errors import TemplateError
from weighbridge.engines.manifest import Program
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression import chains, reference, report
from weighbridge.workers.compression.activations import Seen
from weighbridge.workers.compression.casting import ENGINE
from weighbridge.workers.compression.chains import Pair
from weighbridge.workers.compression.pruning import look, require_torch, skipped
from weighbridge.workers.compression.recovery import Student, recover
from weighbridge.workers.compression.types import BuildFailed, Built, NotApplicable, Order

State = dict[str, torch.Tensor]
_EXAMPLE_ROWS = 3
"""Not 0 or 1, which torch.export takes for constants."""


@dataclass(frozen=True)
class _Cuts:
    """By parameter: which indices stay along which axes, and why others stay whole."""

    kept: dict[str, dict[int, torch.Tensor]]
    reasons: dict[str, str]


def build(order: Order) -> Built:
    """Cut, export the narrower program, tune it where the wish says so. Raises NotApplicable, BuildFailed."""
    require_torch(order)
    module, state = _open(order)
    pairs, reasons = chains.find(module)
    for pair in list(pairs):
        if pattern := skipped(pair.producer, order.wish) or skipped(pair.consumer, order.wish):
            pairs.remove(pair)
            reasons[pair.producer] = f"skipped by {pattern}"
    if not pairs:
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "it has no linear layer"
        raise NotApplicable(f"no two layers of the program can be cut ({said})")
    calibrated = order.data.origin != "synthetic"
    seen = look(reference.open_module(order.original), order, order.wish.calibration_rows) if calibrated else None
    cuts = _cuts(pairs, reasons, state, order.wish.sparsity, seen)
    narrow = {name: _slice(value, cuts.kept.get(name, {})) for name, value in state.items()}
    chains.reshape(module, pairs)
    return _built(order, module, narrow, cuts, calibrated)


def _open(order: Order) -> tuple[fx.GraphModule, State]:
    """The original as a graph of aten operations on CPU, and its weights by parameter, in the program's dtypes."""
    original = order.original
    program = original.manifest.program
    opened = reference.open_module(original)
    state = {name: value.detach().cpu() for name, value in opened.state_dict().items()}
    if program.kind == "factory":
        built = _export(order, opened.float().cpu())
        path = order.folder / "whole.pt2"
        path.write_bytes(built.pt2)
        digest = built.digest
    else:
        assert program.digest is not None, "a bound template has a digest"
        path, digest = original.cache(program.digest), program.digest
    module = template.open_template(path, digest)
    assert isinstance(module, fx.GraphModule), "an exported program is a graph"
    own = module.state_dict()
    state = {name: value.to(own[name].dtype) for name, value in state.items()}
    module.load_state_dict(state, assign=True)
    for name in ("train", "eval"):
        vars(module).pop(name, None)  # an exported program refuses both; to export it again it must have them
    return module, module.state_dict()


def _export(order: Order, module: nn.Module) -> template.Template:
    """A template with the original's inputs and outputs, tried on rows of the order's data."""
    manifest = order.original.manifest
    rows = next(order.data.batches(_EXAMPLE_ROWS, _EXAMPLE_ROWS))
    example = {spec.name: rows[spec.name] for spec in manifest.inputs}
    names = [spec.name for spec in manifest.outputs]
    return template.build(module, manifest.inputs, names, example, positional=True, unread=["*"])


def _cuts(pairs: list[Pair], reasons: dict[str, str], state: State, sparsity: float, seen: Seen | None) -> _Cuts:
    kept: dict[str, dict[int, torch.Tensor]] = {}
    for pair in pairs:
        rows = state[pair.producer]
        count = max(1, rows.shape[0] - round(rows.shape[0] * sparsity))
        stay = _importance(pair, state, seen).topk(count).indices.sort().values
        for name in (pair.producer, *pair.beside):
            kept.setdefault(name, {})[0] = stay
        columns = stay[:, None] * pair.spread + torch.arange(pair.spread)
        kept.setdefault(pair.consumer, {})[1] = columns.flatten()
    return _Cuts(kept, reasons)


def _importance(pair: Pair, state: State, seen: Seen | None) -> torch.Tensor:
    """One number for each channel of the producer, (channels,)."""
    channels = state[pair.producer].shape[0]
    columns = state[pair.consumer].float().transpose(0, 1).flatten(1).norm(dim=1)
    if seen is not None and pair.consumer in seen.layers:
        columns = columns * seen.layers[pair.consumer].norms.cpu()
        rows = torch.ones(channels)
    else:
        rows = state[pair.producer].float().flatten(1).norm(dim=1)
    importance: torch.Tensor = columns.reshape(channels, -1).norm(dim=1) * rows
    return importance


def _slice(value: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    for axis, indices in kept.items():
        value = value.index_select(axis, indices)
    return value.contiguous()


def _put(module: nn.Module, state: State) -> None:
    """Give the module tensors of other shapes, which `load_state_dict` refuses."""
    for name, old in module.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        new = nn.Parameter(state[name], requires_grad=False) if isinstance(old, nn.Parameter) else state[name]
        setattr(module.get_submodule(owner), leaf, new)


def _built(order: Order, module: fx.GraphModule, narrow: State, cuts: _Cuts, calibrated: bool) -> Built:
    original, wish = order.original.manifest, order.wish
    _put(module, narrow)
    try:
        made = _export(order, module.requires_grad_(False))
    except TemplateError as exc:
        raise BuildFailed(f"the narrower program cannot be exported: {exc}") from exc
    path = order.folder / "program.pt2"
    path.write_bytes(made.pt2)
    notes = [f"calibrated on {wish.calibration_rows} rows of {order.data.origin} inputs"] if calibrated else []
    if wish.recover is not None:
        narrow, note = _recovered(order, path, made.digest, narrow)
        notes.append(note)
    file, rows, binding = _write(order, narrow, cuts, made)
    return Built(
        files={"model.safetensors": file},
        tensors=rows,
        engine=ENGINE,
        program=Program(kind="template", name=f"{original.program.name}+{wish.name}", digest=made.digest),
        program_file=path,
        binding=binding,
        promised_ratio=sum(row.bytes_out for row in rows) / max(1, sum(row.bytes_in for row in rows)),
        notes=tuple(notes),
        calibration=order.data.origin if calibrated else None,
    )


def _recovered(order: Order, path: Path, digest: str, narrow: State) -> tuple[State, str]:
    device = order.original.device
    module: nn.Module = template.open_template(path, digest, device)
    module.load_state_dict({name: value.to(device) for name, value in narrow.items()}, assign=True)
    frozen = frozenset(name for name in narrow if skipped(name, order.wish))
    note = recover(Student(module, frozen=frozen, template=(path, digest)), order)
    return module.state_dict(), note


def _write(
    order: Order, narrow: State, cuts: _Cuts, made: template.Template
) -> tuple[Path, tuple[VariantTensor, ...], dict[str, str]]:
    manifest = order.original.manifest
    values = decode(manifest, order.original.cache, "cpu")
    weights = {
        name: narrow[manifest.binding[name]].detach().cpu().to(value.dtype).contiguous()
        for name, value in values.items()
    }
    path = order.folder / "model.safetensors"
    save_file(weights, path)
    rows = tuple(_row(name, values[name], weights[name], cuts, manifest.binding[name]) for name in sorted(values))
    found = {name: template.describe(value, name) for name, value in weights.items()}
    return path, rows, bind(found, made.parameters, cast=True)


def _row(name: str, original: torch.Tensor, new: torch.Tensor, cuts: _Cuts, parameter: str) -> VariantTensor:
    reason = cuts.reasons.get(parameter, "")
    if new.shape != original.shape:
        before, after = ("×".join(map(str, value.shape)) for value in (original, new))
        return report.changed(name, "cut", original, None, bytes_out=new.nbytes, reason=f"{before} → {after}")
    if torch.equal(original, new):
        return report.kept(name, original, reason)
    return report.changed(name, "fine-tuned", original, new, bytes_out=new.nbytes, reason=reason)
