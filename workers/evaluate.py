"""The stage *evaluate*: how good an artifact is on its evaluation set, and whether its gates pass. No Celery, no SQL.

What no gate asks for and nobody can measure is *not applicable*. But where gates stand, an evaluation set that is
absent or wrong rejects, naming its rule: a gate without evidence is not passed, and the registry takes *not applicable*
for "go on".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from weighbridge.engines.errors import EngineError, InvalidInput
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest, TensorSpec
from weighbridge.engines.protocols import Array, BlobPath, Session
from weighbridge.registry.recipe import Gate
from weighbridge.registry.schemas import GateResult, Metric
from weighbridge.storage.safetensors_header import MalformedHeader, ShortFile, header_length, parse_header
from weighbridge.workers.classification import ClassCounts, Scores
from weighbridge.workers.outcome import Outcome

LABELS = "labels"
BATCH_BYTES = 16 << 20
"""Bytes of inputs in one batch, and at most BATCH_ROWS rows."""
BATCH_ROWS = 256
_SLICED = 100
"""Classes beyond this many get no metrics of their own."""
METRICS = ("accuracy", "precision", "recall", "f1")


@dataclass(frozen=True)
class Champion:
    """What the fleet serves now. `scores` by metric on this evaluation set, where they are known already."""

    number: int
    artifact: str
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluateTask:
    """One variant. BLAKE3 digests: `artifact` of its manifest, `dataset` of the eval.safetensors, None without one."""

    artifact: str
    dataset: str | None
    gates: tuple[Gate, ...] = ()
    champion: Champion | None = None
    factories: tuple[str, ...] = ()
    device: str = "cpu"


class BadDataset(Exception):
    """The evaluation set breaks a rule; the message names the tensor and the rule."""


def evaluate(task: EvaluateTask, *, cache: BlobPath, progress: Callable[[float], None] | None = None) -> Outcome:
    """Score an artifact and judge its gates; `progress` is called with the share done, 0 to 1.

    `cache` gives a blob as a local file. Raises only what that raises (a retry may cure it).
    """
    if task.dataset is None:
        return _unmeasured(task, "there is no eval.safetensors")
    try:
        scores = _score(task.artifact, task.dataset, task, cache, progress)
    except BadDataset as wrong:
        return _unmeasured(task, f"eval.safetensors: {wrong}")
    except EngineError as wrong:
        return Outcome.rejected(f"the artifact does not run on eval.safetensors: {wrong}")
    compared = _champion(task, task.dataset, cache)
    results = [result for gate in task.gates for result in _judge(gate, scores, compared)]
    facts = {"dataset_digest": task.dataset, "count": scores.count, "evidence": {"evaluated": True}}
    rows: dict[str, Any] = {"gates": results, "metrics": _metrics(scores, task.dataset)}
    failed = [result.reason for result in results if result.verdict == "failed"]
    if failed:
        return Outcome.rejected("; ".join(failed), facts, **rows)
    return Outcome.passed(f"accuracy {scores.accuracy:.4g}, F1 {scores.f1:.4g} on {scores.count:,} rows", facts, **rows)


def _unmeasured(task: EvaluateTask, reason: str) -> Outcome:
    facts = {"dataset_digest": task.dataset, "evidence": {"evaluated": False}}
    if not task.gates:
        return Outcome.not_applicable(reason, facts)
    gates = [
        GateResult(gate=f"{gate.metric}.{bound}", verdict="failed", limit=limit, reason=reason)
        for gate in task.gates
        for bound, limit in _bounds(gate)
    ]
    return Outcome.rejected(f"the gates cannot be judged: {reason}", facts, gates=gates)


@dataclass(frozen=True)
class _Compared:
    """The champion's scores on the same set, or why there are none; `number` is None without a champion."""

    number: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def _champion(task: EvaluateTask, dataset: str, cache: BlobPath) -> _Compared:
    """Evaluated again only where a `max_drop` needs a number that is not known."""
    champion = task.champion
    if champion is None:
        return _Compared()
    if {gate.metric for gate in task.gates if gate.max_drop is not None} <= champion.scores.keys():
        return _Compared(champion.number, champion.scores)
    try:
        scores = _score(champion.artifact, dataset, task, cache, None)
    except (BadDataset, EngineError) as wrong:
        return _Compared(champion.number, reason=f"champion {champion.number} cannot be evaluated on this set: {wrong}")
    return _Compared(champion.number, {name: float(getattr(scores, name)) for name in METRICS})


def _judge(gate: Gate, scores: Scores, compared: _Compared) -> list[GateResult]:
    """One result per bound of a gate."""
    seen = float(getattr(scores, gate.metric))
    results = []
    for bound, limit in _bounds(gate):
        if bound == "max_drop":
            results.append(_judge_drop(gate.metric, limit, seen, compared))
            continue
        passed = seen >= limit if bound == "min" else seen <= limit
        sign = {("min", True): "≥", ("min", False): "<", ("max", True): "≤", ("max", False): ">"}[bound, passed]
        reason = f"{gate.metric} {_number(seen, limit)} {sign} {_number(limit, seen)} ({bound})"
        results.append(_result(gate.metric, bound, passed, seen, limit, reason))
    return results


def _judge_drop(metric: str, limit: float, seen: float, champion: _Compared) -> GateResult:
    """A champion that cannot be compared with fails the gate; none at all leaves the decision to `min`."""
    if champion.number is None or champion.reason:
        reason = f"{metric}: {champion.reason or 'there is no champion to compare with'} (max_drop {limit:g})"
        verdict = "failed" if champion.reason else "not_applicable"
        return GateResult(gate=f"{metric}.max_drop", verdict=verdict, limit=limit, reason=reason)
    known = champion.scores[metric]
    drop = known - seen
    passed = drop <= limit + 1e-12  # 0.9 − 0.8 is a little more than 0.1
    reason = f"{metric} {seen:.4g} is {abs(drop):.4g} {'below' if drop > 0 else 'above'} champion {champion.number}'s"
    reason += f" {known:.4g} (max_drop {limit:g})"
    return _result(metric, "max_drop", passed, drop, limit, reason)


def _result(metric: str, bound: str, passed: bool, observed: float, limit: float, reason: str) -> GateResult:
    verdict = "passed" if passed else "failed"
    return GateResult(gate=f"{metric}.{bound}", verdict=verdict, observed=observed, limit=limit, reason=reason)


def _bounds(gate: Gate) -> list[tuple[str, float]]:
    bounds = (("min", gate.min), ("max", gate.max), ("max_drop", gate.max_drop))
    return [(name, limit) for name, limit in bounds if limit is not None]


def _number(value: float, other: float) -> str:
    """Two digits, or as many as tell it from the other."""
    digits = next((digits for digits in range(2, 9) if f"{value:.{digits}f}" != f"{other:.{digits}f}"), 2)
    return f"{value:.{digits}f}"


def _score(
    artifact: str, dataset: str, task: EvaluateTask, cache: BlobPath, progress: Callable[[float], None] | None
) -> Scores:
    """Raises BadDataset, EngineError, LookupError."""
    manifest = Manifest.model_validate_json(cache(artifact).read_bytes())
    session = load(manifest, cache, task.device, task.factories)
    try:
        return _run(session, cache(dataset), progress)
    finally:
        session.close()


def _run(session: Session, path: Path, progress: Callable[[float], None] | None) -> Scores:
    """Batch by batch from the mapped file: memory is one batch and its outputs."""
    _check_header(path)
    counts = ClassCounts()
    with safe_open(path, "np") as file:
        count = _check_tensors(file, session.inputs)
        step = _batch(file, session.inputs, count)
        slices = {spec.name: file.get_slice(spec.name) for spec in session.inputs}
        labels = file.get_slice(LABELS)
        for start in range(0, count, step):
            rows = slice(start, min(count, start + step))
            try:
                outputs = session.infer({name: one[rows] for name, one in slices.items()})
            except InvalidInput as wrong:
                raise BadDataset(str(wrong)) from wrong
            _count(counts, labels[rows], outputs[session.outputs[0].name], session.outputs[0])
            if progress is not None:
                progress(rows.stop / count)
    return counts.scores()


def _count(counts: ClassCounts, labels: Array, output: Array, spec: TensorSpec) -> None:
    """Scores [rows, classes] are decided by their largest; a vector of integers is the decision itself."""
    if output.ndim == 2 and output.shape[0] == labels.shape[0]:
        scores = output.astype(np.float64)
        if np.isnan(scores).any():
            raise EngineError(f"output {spec.name} holds NaN")
        predictions = scores.argmax(axis=1)
    elif output.shape == labels.shape and output.dtype.kind in "iu":
        predictions = output
    else:
        raise BadDataset(f"output {spec.name} is {output.dtype}{list(output.shape)}: no scores per class, no classes")
    try:
        counts.add(labels, predictions)
    except ValueError as wrong:
        raise BadDataset(f"{LABELS}: {wrong}") from wrong


def _check_header(path: Path) -> None:
    """The library accepts duplicate keys and headers of any size; we do not."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = header_length(file.read(64 << 10), "the file", size)
            file.seek(8)
            header = parse_header(file.read(length), "the file")
        if size != header.expected_size:
            raise BadDataset(f"the file has {size:,} bytes, {header.expected_size:,} by its header")
    except (MalformedHeader, ShortFile) as wrong:
        raise BadDataset(str(wrong)) from wrong


def _check_tensors(file: Any, specs: Sequence[TensorSpec]) -> int:
    """The number of rows. Raises BadDataset."""
    names, needed = set(file.keys()), {LABELS, *(spec.name for spec in specs)}
    if missing := sorted(needed - names):
        raise BadDataset(f"{missing[0]} is missing; it needs {', '.join(sorted(needed))}")
    try:
        labels = file.get_slice(LABELS)
        if len(labels.get_shape()) != 1 or labels.get_dtype() not in ("U8", "I8", "I16", "U16", "I32", "U32", "I64"):
            raise BadDataset(f"{LABELS} must be a vector of integers, not {labels.get_dtype()}{labels.get_shape()}")
        count = int(labels.get_shape()[0])
        for spec in specs:
            shape = file.get_slice(spec.name).get_shape()
            if shape[:1] != [count] or spec.shape[:1] != (-1,):
                raise BadDataset(f"{spec.name} has the shape {shape}; the rule is one row for each of {count} labels")
    except SafetensorError as wrong:
        raise BadDataset(str(wrong)) from wrong
    if not count:
        raise BadDataset("it has no rows")
    return count


def _batch(file: Any, specs: Sequence[TensorSpec], count: int) -> int:
    """Rows of a batch: within BATCH_BYTES (8 bytes an element at most) and BATCH_ROWS."""
    elements = sum(int(np.prod(file.get_slice(spec.name).get_shape()[1:], dtype=np.int64)) for spec in specs)
    return max(1, min(BATCH_ROWS, count, BATCH_BYTES // max(1, 8 * elements)))


def _metrics(scores: Scores, dataset: str) -> list[Metric]:
    rows = [Metric(name=name, value=getattr(scores, name), dataset_digest=dataset) for name in METRICS]
    for label, (precision, recall, f1, support) in list(scores.classes.items())[:_SLICED]:
        values = {"precision": precision, "recall": recall, "f1": f1, "support": float(support)}
        rows += [
            Metric(
                name=name,
                value=value,
                slice=f"class={label}",
                dataset_digest=dataset,
                unit="rows" * (name == "support"),
            )
            for name, value in values.items()
        ]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate an artifact of local blobs: `python -m weighbridge.workers.evaluate ARTIFACT DATASET --blobs FOLDER`."""
    from weighbridge.storage.blobs import Blobs
    from weighbridge.storage.urls import open_store

    parser = argparse.ArgumentParser(prog="weighbridge.workers.evaluate", description=main.__doc__)
    parser.add_argument("artifact", help="digest of the manifest")
    parser.add_argument("dataset", help="digest of the eval.safetensors")
    parser.add_argument("--blobs", type=Path, required=True, help="the folder that holds blobs/")
    parser.add_argument("--factories", nargs="*", default=[], help="patterns of allowed package.module:factory")
    args = parser.parse_args(argv)
    blobs = Blobs(open_store(args.blobs.resolve().as_uri()))
    task = EvaluateTask(args.artifact, args.dataset, factories=tuple(args.factories))
    outcome = evaluate(task, cache=lambda digest: args.blobs / blobs.key(digest))
    said = asdict(outcome) | {
        "gates": [gate.model_dump() for gate in outcome.gates],
        "metrics": [metric.model_dump() for metric in outcome.metrics],
    }
    print(json.dumps(said, indent=2))
    return 0 if outcome.verdict == "passed" else 1


if __name__ == "__main__":
    sys.exit(main())
