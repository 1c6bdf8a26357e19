"""What a report is about: a version with its measurements, as the registry's API tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from weighbridge.registry.schemas import (
    BenchmarkRow,
    Choice,
    Host,
    Variant,
    VariantBenchmark,
    VariantTensor,
    VersionDetail,
)

if TYPE_CHECKING:
    from weighbridge.registry.client import Client

ORIGINAL = "original"


@dataclass(frozen=True)
class Device:
    """One kind of hardware with the newest fact of every variant that was measured on it, in the variants' order."""

    kind: str
    label: str
    facts: Mapping[str, VariantBenchmark]


@dataclass(frozen=True)
class Subject:
    """A version; `tensors` by variant. `measured` newest first, spoilt measurements too."""

    version: VersionDetail
    measured: Sequence[VariantBenchmark] = ()
    tensors: Mapping[str, Sequence[VariantTensor]] = field(default_factory=dict)
    choices: Sequence[Choice] = ()
    hosts: Sequence[Host] = ()
    """Those that are to hold something of the model, by name."""

    @cached_property
    def variants(self) -> list[Variant]:
        """The original first."""
        return sorted(self.version.variants, key=lambda one: one.name != ORIGINAL)

    @cached_property
    def original(self) -> Variant | None:
        return next((one for one in self.variants if one.name == ORIGINAL), None)

    @property
    def original_size(self) -> int:
        """Bytes of the original's weights; 0: not known."""
        return (self.original.size if self.original else 0) or self.version.size

    @cached_property
    def devices(self) -> list[Device]:
        """Kinds with a valid measurement, by their labels."""
        order = {one.name: place for place, one in enumerate(self.variants)}
        newest: dict[str, dict[str, VariantBenchmark]] = {}
        for one in self.measured:
            if one.status == "valid":
                newest.setdefault(one.kind, {}).setdefault(one.variant, one)
        found = []
        for kind, facts in newest.items():
            ordered = dict(sorted(facts.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
            label = next((str(f.hardware["label"]) for f in ordered.values() if f.hardware.get("label")), kind)
            found.append(Device(kind, label, ordered))
        return sorted(found, key=lambda one: (one.label, one.kind))

    @cached_property
    def spoilt(self) -> list[VariantBenchmark]:
        """Measurements on a machine that was too busy: no facts."""
        return [one for one in self.measured if one.status != "valid"]

    @property
    def recipe(self) -> dict[str, Any]:
        return self.version.recipe or {}


def collect(client: Client, model: str, selector: int | str) -> Subject:
    """Ask the registry for everything that is known. Raises what the client raises."""
    version = client.version(model, selector)
    built = [one.name for one in version.variants if one.name != ORIGINAL]
    return Subject(
        version,
        client.benchmarks(model, version.number),
        {name: client.tensors(model, version.number, name) for name in built},
        client.choices(model, version.number) if version.status == "ready" else (),
        sorted((host for host in client.hosts() if _of(host, model)), key=lambda host: (host.name, host.id)),
    )


def _of(host: Host, model: str) -> bool:
    return host.state == "enrolled" and any(held.model == model for held in host.assignments)


OUTPUT = "output="
_PARTS = ("class=", OUTPUT)
"""Slices that are of parts: of one class, of an output that no metric reads."""


def metric(variant: Variant | None, name: str, slice_: str | None = None) -> float | None:
    """A variant's number over all rows (or of one slice); None where it was not measured."""
    for one in variant.metrics if variant else ():
        if one.name == name and (one.slice == slice_ if slice_ is not None else not one.slice.startswith(_PARTS)):
            return one.value
    return None


def serving_row(one: VariantBenchmark) -> BenchmarkRow | None:
    """One stream in the mode that a host serves in: the first that is measured."""
    return next((row for row in one.rows if row.scenario == "single_stream"), None)


def serving_rows(one: VariantBenchmark, scenario: str) -> list[BenchmarkRow]:
    """A sweep in the mode that a host serves in."""
    first = serving_row(one)
    return [row for row in one.rows if row.scenario == scenario and (first is None or row.mode == first.mode)]
