"""What a confined child may ask of its worker, each verb as the desk answers it; and how its outcome is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from weighbridge.engines.stream import TensorStats
from weighbridge.registry.lifecycle import Verdict
from weighbridge.registry.schemas import GateResult, Metric
from weighbridge.storage.protocols import Ref
from weighbridge.storage.safetensors_header import Header, TensorInfo
from weighbridge.workers.confined import wire
from weighbridge.workers.desk import Desk
from weighbridge.workers.outcome import Outcome

_ROW = attrgetter(*(field.name for field in fields(TensorStats)))


def _get(desk: Desk, said: wire.Said) -> tuple[Any, bytes]:
    ref = Ref(**said.head["ref"])
    return None, desk.get(ref.key, start=int(said.head["start"]), end=said.head["end"], if_match=ref)


def _take(desk: Desk, said: wire.Said) -> tuple[Any, bytes]:
    layout = said.head["layout"]
    header = None
    if layout is not None:
        rows = {
            name: TensorInfo(dtype, tuple(shape), start, end) for name, dtype, shape, start, end in layout["tensors"]
        }
        header = Header(rows, {}, int(layout["length"]))
    taken = desk.take(str(said.head["name"]), Ref(**said.head["ref"]), header)
    return (taken.file, list(map(_ROW, taken.stats))), b""  # as tuples: to pickle 200,000 objects takes a second


VERBS: dict[str, Callable[[Desk, wire.Said], tuple[Any, bytes]]] = {
    "get": _get,
    "take": _take,
    "digest": lambda desk, said: (desk.digest([Ref(**ref) for ref in said.head["refs"]]), b""),
    "path": lambda desk, said: (desk.path(str(said.head["digest"])), b""),
    "put_bytes": lambda desk, said: (desk.put_bytes(said.body), b""),
    "put_file": lambda desk, said: (desk.put_file(Path(said.head["path"])), b""),
}
"""What a child may ask."""


def read_outcome(said: dict[str, Any]) -> Outcome:
    """What a child found, as it wrote it."""
    return Outcome(
        Verdict(said["verdict"]),
        str(said["reason"]),
        dict(said["facts"]),
        gates=[GateResult.model_validate(gate) for gate in said["gates"]],
        metrics=[Metric.model_validate(metric) for metric in said["metrics"]],
    )
