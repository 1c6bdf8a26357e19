"""What a confined child may ask of its worker, each verb as the desk answers it; and how its outcome is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.registry.lifecycle import Verdict
from weighbridge.registry.schemas import GateResult, Metric
from weighbridge.storage.protocols import Ref
from weighbridge.storage.safetensors_header import Header, TensorInfo
from weighbridge.workers.confined import wire
from weighbridge.workers.desk import Desk
from weighbridge.workers.outcome import Outcome

_LEARNT = [attrgetter(field.name) for field in fields(TensorStats)[4:]]
"""Name, dtype, shape and size the child knows. What passes of many tensors is a list for each field: as a row for each
of 200,000, a second went into collecting garbage."""


def _get(desk: Desk, said: wire.Said) -> tuple[Any, bytes]:
    ref = Ref(**said.head["ref"])
    return None, desk.get(ref.key, start=int(said.head["start"]), end=said.head["end"], if_match=ref)


def _take(desk: Desk, said: wire.Said) -> tuple[Any, bytes]:
    layout = said.head["layout"]
    header = None if layout is None else Header(_tensors(layout), {}, int(layout["length"]))
    taken = desk.take(str(said.head["name"]), Ref(**said.head["ref"]), header)
    return (taken.file, [list(map(column, taken.stats)) for column in _LEARNT]), b""


def _tensors(layout: dict[str, Any]) -> dict[str, TensorInfo]:
    sizes = iter(layout["sizes"])
    shapes = (tuple(islice(sizes, rank)) for rank in layout["ranks"])
    rows = map(TensorInfo, layout["dtypes"], shapes, layout["starts"], layout["ends"])
    return dict(zip(layout["names"], rows, strict=True))


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
