"""A variant against its original on the same inputs: what it keeps of the metric, and how far its outputs drift.

Fail closed: what cannot be measured does not pass. Where there is no evaluation set, drift on the original's golden
inputs and on synthetic ones decides, and the verdict says that it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from weighbridge.engines import golden, tensors
from weighbridge.engines.blobs import read, read_manifest
from weighbridge.engines.errors import EngineError, InvalidInput
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Manifest, TensorSpec
from weighbridge.engines.protocols import Array, BlobPath, Session
from weighbridge.registry.recipe import MetricName, Quality, Task
from weighbridge.registry.schemas import Metric
from weighbridge.workers.evaluation import bootstrap, outputs, reading, runs, tasks
from weighbridge.workers.evaluation.datasets import BadDataset, Batch, Source, open_dataset
from weighbridge.workers.evaluation.drift import UNITS, Drift
from weighbridge.workers.evaluation.judging import Measured, judge
from weighbridge.workers.ours import raise_ours
from weighbridge.workers.outcome import Outcome

SYNTHETIC_ROWS, SYNTHETIC_BATCH = 256, 64
R2_OUTPUTS = 64
"""Outputs of a regression whose r2 can be resampled: every row keeps three numbers for each."""


@dataclass(frozen=True)
class CompareTask:
    """BLAKE3 digests: `artifact` and `original` of manifests, `dataset` of the eval.safetensors, None without one."""

    artifact: str
    original: str
    dataset: str | None
    task: Task = "classification"
    quality: Quality = field(default_factory=Quality)
    factories: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int | None = None
    output: str | None = None
    threshold: float | None = None
    """As an EvaluateTask's."""


def compare(task: CompareTask, *, cache: BlobPath, progress: Callable[[float], None] | None = None) -> Outcome:
    """Judge a variant; `progress` is called with the share done, 0 to 1. `cache` gives a blob as a local file.

    Raises only what `cache` raises, and MemoryError or torch's OutOfMemoryError where not even one row of one artifact
    fits: a retry may cure both.
    """
    measured = Measured()
    try:
        _measure(task, cache, progress, measured)
    except BadDataset as wrong:
        return Outcome.rejected(f"eval.safetensors: {wrong}", _facts(task, None))
    except reading.Unclear as unclear:
        return Outcome.rejected(f"recipe.yaml: {unclear}", _facts(task, None))
    except InvalidInput as wrong:
        of = "eval.safetensors" if task.dataset else "the original's golden and synthetic inputs"
        return Outcome.rejected(f"{of}: {wrong}", _facts(task, None))
    except EngineError as wrong:
        if runs.out_of_memory(wrong):
            raise MemoryError(str(wrong)) from wrong
        raise_ours(wrong)
        return Outcome.rejected(f"it cannot be compared with its original: {wrong}", _facts(task, None))
    rows: dict[str, Any] = {
        "gates": judge(task.task, task.quality, measured, labelled=task.dataset is not None),
        "metrics": _metrics(task, measured),
    }
    facts = _facts(task, measured)
    failed = [result.reason for result in rows["gates"] if result.verdict == "failed"]
    if failed:
        return Outcome.rejected("; ".join(failed), facts, **rows)
    return Outcome.passed("; ".join(result.reason for result in rows["gates"]), facts, **rows)


def _measure(task: CompareTask, cache: BlobPath, progress: Callable[[float], None] | None, measured: Measured) -> None:
    """Raises BadDataset, Unclear, EngineError, LookupError."""
    original, variant = (read_manifest(cache, digest) for digest in (task.original, task.artifact))
    with _source(task, original, cache) as source:
        opened = [partial(_load, manifest, cache, task) for manifest in (original, variant)]
        read = _reading(task, original, source, opened[0])
        measuring = _Measuring(task, original.outputs, read, source.rows)
        for batch, first, second in runs.pairs(opened[0], opened[1], source, measured.notes):
            measuring.add(batch, first, second)
            if progress is not None:
                progress(measuring.rows / source.rows)
    measuring.finish(measured)


def _reading(task: CompareTask, original: Manifest, source: Source, opened: runs.Open) -> reading.Reading | None:
    """What the original's answers say of its output. None: no set, and several outputs of which none is the one."""
    specs, session = original.outputs, None
    if unknown := sorted(task.quality.outputs.keys() - {spec.name for spec in specs}):
        listed = ", ".join(spec.name for spec in specs)
        raise reading.Unclear(f"quality.outputs: {unknown[0]} is none of the program's outputs ({listed})")

    def answer(batch: Batch) -> runs.Answers:
        nonlocal session
        session = session or opened()
        return runs.Runner(session, "the original's").batch(batch)

    try:
        return reading.find(task.task, specs, source, answer, named=task.output, threshold=task.threshold)
    except reading.Unclear:
        if task.dataset is None and task.output is None and task.threshold is None:
            return None
        raise
    finally:
        if session is not None:
            session.close()


def _load(manifest: Manifest, cache: BlobPath, task: CompareTask) -> Session:
    return load(manifest, cache, task.device, task.factories, threads=task.threads)


@contextmanager
def _source(task: CompareTask, manifest: Manifest, cache: BlobPath) -> Iterator[Source]:
    if task.dataset is None:
        yield _Drawn(manifest, cache)
        return
    with open_dataset(cache(task.dataset), manifest.inputs, task.task) as dataset:
        yield dataset


class _Drawn:
    """The golden inputs of an original, and synthetic ones of several seeds. Raises InvalidInput."""

    def __init__(self, manifest: Manifest, cache: BlobPath) -> None:
        self._inputs = manifest.inputs
        self._golden, _ = golden.read(read(cache, manifest.golden.digest, "the reference golden"))
        drawn = runs.count((self._draw(1), None))
        self._seeds = range(1, 1 + -(-SYNTHETIC_ROWS // drawn))
        self.rows = runs.count((self._golden, None)) + drawn * len(self._seeds)
        self.classes: tuple[int, int] | None = None
        self.label_shape: tuple[int, ...] | None = None

    def batches(self) -> Iterator[Batch]:
        yield self._golden, None
        for seed in self._seeds:
            yield self._draw(seed), None

    def learn(self, *outputs: Array) -> None:
        """Few rows, and short where lengths are free."""

    def _draw(self, seed: int) -> dict[str, Array]:
        return tensors.synthetic(self._inputs, size=SYNTHETIC_BATCH, seed=seed)


class _Measuring:
    """One pass: both meters where there is a set, the rows of the metric to keep, and the drift of every output."""

    def __init__(self, task: CompareTask, specs: Sequence[TensorSpec], read: reading.Reading | None, rows: int) -> None:
        self._task, self._read, self.rows = task, read, 0
        main = read.spec.name if read is not None else None
        judged = [spec for spec in specs if spec.name != main or spec.name in task.quality.outputs]
        self._others = {spec.name: outputs.OutputDrift(spec) for spec in judged}
        self._metric: MetricName = task.quality.metric or tasks.METRICS[task.task][0]
        self._drift = Drift(task.task, rows)
        self._meters = []
        if read is not None and task.dataset:
            self._meters = [tasks.meter(task.task, read.spec, rows) for _ in range(2)]
        self._kept: list[Array] = []
        self._reason = ""
        if self._metric not in tasks.METRICS[task.task]:
            self._reason = f"{task.task} has no {self._metric} ({', '.join(tasks.METRICS[task.task])})"

    def add(self, batch: Batch, original: runs.Answers, variant: runs.Answers) -> None:
        """Count a batch. Raises BadDataset, EngineError."""
        self.rows += runs.count(batch)
        for name, drift in self._others.items():
            drift.add(original[name], variant[name])
        if self._read is not None:
            name = self._read.spec.name
            if original[name].shape != variant[name].shape:
                shapes = f"{list(variant[name].shape)}, the original's {list(original[name].shape)}"
                raise EngineError(f"the variant's output {name} is {shapes}")
            self._add_read(batch, self._read.scores(original[name]), self._read.scores(variant[name]))

    def _add_read(self, batch: Batch, original: Array, variant: Array) -> None:
        inputs, labels = batch
        if not self._meters:
            self._drift.add(original, variant)
            return
        labels = tasks.targets(self._task.task, inputs, labels)
        counted = labels != tasks.IGNORED if self._task.task == "language" and labels is not None else None
        terms = [meter.add(labels, output) for meter, output in zip(self._meters, (original, variant), strict=True)]
        self._drift.add(original, variant, counted)
        if self._task.task != "embedding" and not self._reason:
            self._keep(labels, *terms)

    def _keep(self, labels: Array | None, original: tasks.Terms, variant: tasks.Terms) -> None:
        """The terms that `bootstrap.kept` takes."""
        metric = self._metric
        if metric in ("precision", "recall", "f1"):
            assert labels is not None
            self._kept.append(np.column_stack([labels, original["classes"], variant["classes"]]).astype(np.float64))
        elif metric == "r2" and original["r2"].shape[1] > R2_OUTPUTS:
            self._reason = f"r2 of more than {R2_OUTPUTS} outputs is not resampled: choose quality.metric mse or mae"
        elif metric == "r2":
            self._kept.append(np.hstack([original["targets"], original["r2"], variant["r2"]]))
        else:
            self._kept.append(np.column_stack([original[metric], variant[metric], original["count"]]))

    def finish(self, measured: Measured) -> None:
        """Write down what was found. Raises BadDataset, EngineError."""
        measured.rows, measured.drift = self.rows, self._drift.results()
        measured.others = {name: (one.kind, one.results()) for name, one in self._others.items()}
        if self._read is not None:
            measured.output = self._read.spec.name
            measured.notes += self._read.notes
        if not self._meters:
            return
        measured.original, measured.variant = (meter.scores() for meter in self._meters)
        measured.slices = self._meters[1].slices()
        measured.notes += self._meters[1].notes()
        rows = self._of_embedding() if self._task.task == "embedding" and not self._reason else None
        if rows is None and self._kept:
            rows = np.concatenate(self._kept)
        if not self._reason and rows is not None:
            measured.kept = bootstrap.kept(self._metric, rows, confidence=self._task.quality.confidence)
            if measured.kept.original <= 0 and self._metric not in bootstrap.ERRORS:
                self._reason = f"the original's {self._metric} is {measured.kept.original:.4g}: there is no share of it"
        if self._reason:
            measured.kept, measured.reason = None, self._reason

    def _of_embedding(self) -> Array | None:
        """An original has cosine 1 with itself and its own neighbours: what is kept is the mean itself."""
        if self._metric == "accuracy":
            right = [meter.right() for meter in self._meters if isinstance(meter, tasks.Retrieval)]
            found = [one for one in right if one is not None]
            if len(found) < 2:
                self._reason = "accuracy of an embedding needs classes as labels, and two rows"
                return None
            return np.column_stack([*found, np.ones(len(found[0]))]).astype(np.float64)
        kept = self._drift.cosines() if self._metric == "cosine" else self._drift.agreement()
        if not len(kept):
            self._reason = f"{self._metric} needs more rows"
            return None
        return np.column_stack([np.ones(len(kept)), kept, np.ones(len(kept))]).astype(np.float64)


def _metrics(task: CompareTask, measured: Measured) -> list[Metric]:
    """The variant's own numbers; drift without a set is marked as of synthetic inputs."""
    of = {"dataset_digest": task.dataset} if task.dataset else {"slice": "synthetic"}
    values = {**measured.variant, **measured.drift}
    if measured.kept is not None:
        values |= {"kept": measured.kept.share, "kept_bound": measured.kept.bound}
    rows = [Metric(name=name, value=value, unit=UNITS.get(name, ""), **of) for name, value in values.items()]
    rows += [
        Metric(name=name, value=value, unit=UNITS.get(name, ""), slice=f"output={output}")
        for output, (_, drift) in measured.others.items()
        for name, value in drift.items()
    ]
    return rows + [row.model_copy(update={"dataset_digest": task.dataset}) for row in measured.slices]


def _facts(task: CompareTask, measured: Measured | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "drift_on": "eval" if task.dataset else "golden+synthetic",
        "dataset_digest": task.dataset,
        "evidence": {"evaluated": measured is not None and task.dataset is not None},
    }
    if measured is not None:
        facts["rows"] = measured.rows
        facts |= {"output": measured.output} if measured.output else {}
        facts |= {"notes": measured.notes} if measured.notes else {}
        if kept := measured.kept:
            facts |= {"metric": kept.metric, "kept": kept.share, "kept_bound": kept.bound}
    return facts
