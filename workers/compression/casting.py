"""`bf16` and `fp16`: every floating tensor in 16 bits.

The program's constants, its inputs and what lies between its layers stay in its own dtype. In bf16, which has float32's
range, its linear layers multiply in 16 bits; of fp16, which ends at 65,504, only the weights are kept so.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from weighbridge.engines import datatypes
from weighbridge.engines.encodings import decode
from weighbridge.engines.manifest import Encoding
from weighbridge.registry.schemas import VariantTensor
from weighbridge.workers.compression import reference, report
from weighbridge.workers.compression.types import Built, NotApplicable, Order

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ENGINE = {"name": "torch", "minimum": "2.8"}


def build(order: Order) -> Built:
    """Cast; a tensor that the dtype cannot hold is kept and named. Raises NotApplicable."""
    method, manifest = order.wish.method, order.original.manifest
    if manifest.engine.get("name", "torch") != "torch":
        raise NotApplicable(f"{method}: the original is no torch program; use onnx-fp16")
    weights = decode(manifest, order.original.cache, "cpu")
    rows: list[VariantTensor] = []
    made: dict[str, torch.Tensor] = {}
    for done, (name, value) in enumerate(sorted(weights.items())):
        made[name], row = _cast(name, value, order)
        rows.append(row)
        order.progress(done / len(weights))
    if all(row.action == report.KEPT for row in rows):
        raise NotApplicable(f"{method}: no tensor would change ({rows[0].name}: {rows[0].reason})")
    path = order.folder / "model.safetensors"
    save_file(made, path)
    stay = [row.name for row in rows if row.action == report.KEPT and weights[row.name].is_floating_point()]
    note = (f"{', '.join(stay[:5])} stay as they are",) if stay else ()
    encoding = Encoding(kind="half") if method == "bf16" else None
    return Built(
        files={"model.safetensors": path},
        tensors=tuple(rows),
        engine=ENGINE,
        promised_ratio=sum(row.bytes_out for row in rows) / max(1, sum(row.bytes_in for row in rows)),
        compute_dtypes=("BF16",) if encoding else _computed(order),
        encoding=encoding,
        notes=note,
    )


def _computed(order: Order) -> tuple[str, ...]:
    """The safetensors names of the program's own floating dtypes."""
    dtypes = {value.dtype for value in reference.open_module(order.original).state_dict().values()}
    return tuple(sorted(datatypes.to_safetensors(datatypes.from_torch(one)) for one in dtypes if one.is_floating_point))


def _cast(name: str, value: torch.Tensor, order: Order) -> tuple[torch.Tensor, VariantTensor]:
    method = order.wish.method
    dtype = _DTYPES[method]
    if pattern := report.skipped(name, order.wish.skip):
        return value, report.kept(name, value, f"skipped by {pattern}")
    if not value.is_floating_point():
        return value, report.kept(name, value, report.SMALL)
    if value.dtype.itemsize < dtype.itemsize or value.dtype is dtype:
        return value, report.kept(name, value, f"already {str(value.dtype).removeprefix('torch.')}")
    cast = value.to(dtype)
    if not torch.isfinite(cast).all():
        largest = float(value.abs().max())
        return value, report.kept(name, value, f"{method} holds up to {torch.finfo(dtype).max:g}, it has {largest:g}")
    return cast, report.changed(name, "cast", value, cast, bytes_out=cast.nbytes, reason=method)
