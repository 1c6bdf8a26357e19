"""The verdict on a variant, from what a comparison measured. Pure.

Fail closed: what was not measured does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weighbridge.registry.recipe import OutputQuality, Quality, Task
from weighbridge.registry.schemas import GateResult, Metric
from weighbridge.workers.evaluation import bootstrap, gates, outputs

_CLASSES: Mapping[str, float] = {"min_top1": 0.98, "max_kl_mean": 0.02}
_VECTORS: Mapping[str, float] = {"min_cosine": 0.99}
DEFAULTS: Mapping[Task, Mapping[str, float]] = {
    "classification": _CLASSES,
    "language": _CLASSES,
    "regression": _VECTORS,
    "embedding": _VECTORS,
}
"""Bounds of drift where no evaluation set decides and the recipe gives none.

On samples of the original's own answers a mean divergence of KL nats multiplies the perplexity by exp(KL): 0.02 is 2%.
Synthetic rows lie nearer to decision boundaries than data does, so top1 asks for 98% where `keep` asks for 99%.
Measured on a digits MLP, synthetic rows: int8 99.6 to 100% and at most 0.0005 nats; int4 94.6% and 0.011 (99.5% on
data: such a variant needs a set to pass); 2 bits 74% and 0.77. A static ONNX variant, calibrated on data, fails on
noise: 47%.
A cosine of 0.99 is a difference of 14% of a vector's length: a floor for embeddings, and little proof for a regression,
which should bring a set.
"""
_OUTPUT_MEASURE = {"min_top1": "top1", "max_kl_mean": "kl_mean", "max_error": "error", "min_cosine": "cosine"}
_MEASURE = {"min_top1": "top1", "max_kl_mean": "kl_mean", "max_kl_p99": "kl_p99", "min_cosine": "cosine"}


@dataclass
class Measured:
    """What one pass found. `kept` is None where no share can be given; `reason` says why."""

    rows: int = 0
    drift: Mapping[str, float] = field(default_factory=dict)
    original: Mapping[str, float] = field(default_factory=dict)
    variant: Mapping[str, float] = field(default_factory=dict)
    slices: list[Metric] = field(default_factory=list)
    kept: bootstrap.Kept | None = None
    reason: str = ""
    output: str | None = None
    """The one that a metric reads; None where none is named and there is no set."""
    others: Mapping[str, tuple[outputs.Kind, Mapping[str, float]]] = field(default_factory=dict)
    """Drift of every other output, and of those that the recipe bounds, by name."""
    notes: list[str] = field(default_factory=list)


def judge(task: Task, quality: Quality, measured: Measured, *, labelled: bool) -> list[GateResult]:
    """`quality.keep` where there is a set; the bounds of drift that are given, or without a set the defaults; and the
    drift of every output that no metric reads."""
    results = [_judge_keep(quality, measured)] if labelled else []
    for name, measure in _MEASURE.items() if measured.output is not None else ():
        limit = getattr(quality, name)
        if limit is None and not labelled:
            limit = DEFAULTS[task].get(name)
        if limit is None:
            continue
        if measure not in measured.drift:
            results.append(gates.unmeasured(f"quality.{name}", limit, f"{measure} is not measured for {task}"))
            continue
        seen = measured.drift[measure]
        results.append(gates.bound(f"quality.{name}", measure, seen, limit, least=name.startswith("min")))
    for output, (kind, drift) in measured.others.items():
        results += _judge_output(output, kind, drift, quality.outputs.get(output), output == measured.output)
    return results


def _judge_output(
    output: str, kind: outputs.Kind, drift: Mapping[str, float], given: OutputQuality | None, read: bool
) -> list[GateResult]:
    """By the bounds that are given; those of its kind stand where they are not, unless a metric reads it."""
    limits = {} if read else dict(outputs.DEFAULTS[kind])
    if given is not None:
        limits |= given.model_dump(exclude_none=True)
    results = []
    for name, limit in limits.items():
        gate, measure = f"quality.outputs.{output}.{name}", _OUTPUT_MEASURE[name]
        if measure not in drift:
            results.append(gates.unmeasured(gate, limit, f"output {output}: {measure} is not measured for {kind}"))
            continue
        said = f"output {output}: {measure}"
        results.append(gates.bound(gate, said, drift[measure], limit, least=name.startswith("min")))
    return results


def _judge_keep(quality: Quality, measured: Measured) -> GateResult:
    kept = measured.kept
    if kept is None:
        return gates.unmeasured("quality.keep", quality.keep, measured.reason)
    share, bound = (gates.percent(one, quality.keep) for one in (kept.share, kept.bound))
    reason = f"keeps {share} of {kept.metric} {kept.original:.4g} ({100 * quality.confidence:g}% bound {bound}), "
    reason += f"needs {100 * quality.keep:g}%"
    return gates.result("quality.keep", kept.bound >= quality.keep, kept.bound, quality.keep, reason)
