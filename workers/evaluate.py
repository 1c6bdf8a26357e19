"""The stage *evaluate*: how good an artifact is on its evaluation set, and whether its gates pass. No Celery, no SQL.

What no gate asks for and nobody can measure is *not applicable*; so is a gate of a metric that the task does not have,
unless it is `required`. But where other gates stand, an evaluation set that is absent or wrong rejects, naming its
rule: a gate without evidence is not passed, and the registry takes *not applicable* for "go on". A variant is judged
against its original instead: `compare`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from weighbridge import terminal
from weighbridge.engines.blobs import read_manifest
from weighbridge.engines.errors import EngineError, InvalidInput
from weighbridge.engines.load import load
from weighbridge.engines.protocols import BlobPath
from weighbridge.registry.recipe import Gate, Quality, Task
from weighbridge.registry.schemas import Metric
from weighbridge.words import counted
from weighbridge.workers.evaluation import reading, runs, tasks, verdicts
from weighbridge.workers.evaluation.compare import CompareTask, compare
from weighbridge.workers.evaluation.datasets import BadDataset, open_dataset
from weighbridge.workers.evaluation.verdicts import Compared
from weighbridge.workers.ours import raise_ours
from weighbridge.workers.outcome import Outcome

__all__ = ["Champion", "CompareTask", "EvaluateTask", "compare", "evaluate", "main"]


NO_SET = "there is no eval.safetensors"


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
    task: Task = "classification"
    output: str | None = None
    threshold: float | None = None
    """Which output the metrics read, and where one number a row divides the classes; None: by rule (`reading`)."""
    absent: str = NO_SET
    """Why there is no dataset."""


@dataclass(frozen=True)
class Scores:
    """What an artifact scores: by metric over all rows, and by slices."""

    values: Mapping[str, float]
    slices: list[Metric]
    rows: int
    output: str
    """The one that was read."""
    notes: tuple[str, ...] = ()


def evaluate(task: EvaluateTask, *, cache: BlobPath, progress: Callable[[float], None] | None = None) -> Outcome:
    """Score an artifact and judge its gates; `progress` is called with the share done, 0 to 1.

    `cache` gives a blob as a local file. Raises only what that raises, and MemoryError (a retry may cure both).
    """
    if task.dataset is None:
        return _unmeasured(task, task.absent)
    try:
        scores = _score(task.artifact, task.dataset, task, cache, progress)
    except BadDataset as wrong:
        return _unmeasured(task, f"eval.safetensors: {wrong}")
    except reading.Unclear as unclear:
        return _unmeasured(task, f"recipe.yaml: {unclear}")
    except EngineError as wrong:
        if runs.out_of_memory(wrong):
            raise MemoryError(str(wrong)) from wrong
        raise_ours(wrong)
        return Outcome.rejected(f"the artifact does not run on eval.safetensors: {wrong}")
    if not scores.values:
        return _unmeasured(task, f"{task.task} has no metric of its own without labels of classes in eval.safetensors")
    compared = _champion(task, task.dataset, cache)
    results = [result for gate in task.gates for result in verdicts.judge(gate, task.task, scores.values, compared)]
    facts: dict[str, Any] = {"dataset_digest": task.dataset, "count": scores.rows, "evidence": {"evaluated": True}}
    facts |= {"output": scores.output} | ({"notes": list(scores.notes)} if scores.notes else {})
    rows: dict[str, Any] = {"gates": results, "metrics": _metrics(scores, task.dataset)}
    failed = [result.reason for result in results if result.verdict == "failed"]
    if failed:
        return Outcome.rejected("; ".join(failed), facts, **rows)
    said = ", ".join(
        f"{_SAID.get(name, name)} {value:.4g}" for name, value in scores.values.items() if name not in _LONG
    )
    return Outcome.passed(f"{said} on {counted(scores.rows, 'row')}", facts, **rows)


_SAID = {"f1": "F1", "r2": "R²"}
_LONG = ("precision", "recall")


def _unmeasured(task: EvaluateTask, reason: str) -> Outcome:
    facts = {"dataset_digest": task.dataset, "evidence": {"evaluated": False}}
    results = verdicts.unmeasured(task.gates, task.task, reason)
    if any(result.verdict == "failed" for result in results):
        return Outcome.rejected(f"the gates cannot be judged: {reason}", facts, gates=results)
    return Outcome.not_applicable(reason, facts, gates=results)


def _champion(task: EvaluateTask, dataset: str, cache: BlobPath) -> Compared:
    """Evaluated again only where a `max_drop` needs a number that is not known."""
    champion = task.champion
    if champion is None:
        return Compared()
    asked = {gate.metric for gate in task.gates if gate.max_drop is not None and verdicts.concerns(gate, task.task)}
    if asked <= champion.scores.keys():
        return Compared(champion.number, champion.scores)
    try:
        scores = _score(champion.artifact, dataset, task, cache, None)
    except (BadDataset, EngineError, reading.Unclear) as wrong:
        raise_ours(wrong)
        return Compared(champion.number, reason=f"champion {champion.number} cannot be evaluated on this set: {wrong}")
    return Compared(champion.number, scores.values)


def _score(
    artifact: str, dataset: str, task: EvaluateTask, cache: BlobPath, progress: Callable[[float], None] | None
) -> Scores:
    """Batch by batch from the mapped file: memory is one batch and its outputs.

    Raises BadDataset, Unclear, EngineError, LookupError.
    """
    manifest = read_manifest(cache, artifact)
    session = load(manifest, cache, task.device, task.factories)
    try:
        runner = runs.Runner(session)
        with open_dataset(cache(dataset), session.inputs, task.task) as data:
            read = reading.find(
                task.task, session.outputs, data, runner.batch, named=task.output, threshold=task.threshold
            )
            meter = tasks.meter(task.task, read.spec, data.rows)
            done = 0
            for batch in data.batches():
                answers = runner.batch(batch)
                data.learn(*answers.values())
                meter.add(tasks.targets(task.task, *batch), read.scores(answers[read.spec.name]))
                done += runs.count(batch)
                if progress is not None:
                    progress(done / data.rows)
            notes = (*read.notes, *meter.notes(), *runner.notes)
            return Scores(meter.scores(), meter.slices(), data.rows, read.spec.name, notes)
    except InvalidInput as wrong:
        raise BadDataset(str(wrong)) from wrong
    finally:
        session.close()


def _metrics(scores: Scores, dataset: str) -> list[Metric]:
    rows = [Metric(name=name, value=value) for name, value in scores.values.items()]
    return [row.model_copy(update={"dataset_digest": dataset}) for row in (*rows, *scores.slices)]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate an artifact of local blobs, or compare it with its original; prints tables, or JSON of everything.

    python -m weighbridge.workers.evaluate ARTIFACT [DATASET] --blobs FOLDER [--against ORIGINAL] [--task TASK]
    """
    from weighbridge.storage.in_place import InPlace

    args = _arguments().parse_args(argv)
    cache = InPlace.of(args.blobs).path
    read = {"task": args.task, "output": args.output, "threshold": args.threshold}
    common: dict[str, Any] = {**read, "factories": tuple(args.factories), "device": args.device}
    if args.against:
        quality = Quality.model_validate_json(args.quality)
        outcome = compare(
            CompareTask(args.artifact, args.against, args.dataset, quality=quality, **common), cache=cache
        )
    else:
        outcome = evaluate(EvaluateTask(args.artifact, args.dataset, **common), cache=cache)
    if args.tables:
        _print_tables(outcome)
    else:
        print(json.dumps(_plain(outcome), indent=2))
    return 0 if outcome.verdict == "passed" else 1


def _arguments() -> terminal.Arguments:
    parser = terminal.Arguments(prog="weighbridge.workers.evaluate", description=main.__doc__)
    parser.add_argument("artifact", help="digest of the manifest")
    parser.add_argument("dataset", nargs="?", help="digest of the eval.safetensors; none: drift on synthetic inputs")
    parser.add_argument("--blobs", type=Path, required=True, help="the folder that holds blobs/")
    parser.add_argument("--against", metavar="ORIGINAL", help="digest of the original's manifest: compare with it")
    parser.add_argument("--task", choices=get_args(Task), default="classification")
    parser.add_argument("--output", help="which output the metrics read")
    parser.add_argument("--threshold", type=float, help="class 1 above it, where one number a row decides")
    parser.add_argument("--quality", default="{}", help='bounds as JSON, as in a recipe: {"keep": 0.999}')
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tables", action="store_true", help="tables for people instead of JSON")
    parser.add_argument("--factories", nargs="*", default=[], help="patterns of allowed package.module:factory")
    return parser


def _plain(outcome: Outcome) -> dict[str, Any]:
    return asdict(outcome) | {
        "gates": [gate.model_dump() for gate in outcome.gates],
        "metrics": [metric.model_dump() for metric in outcome.metrics],
    }


def _print_tables(outcome: Outcome) -> None:
    metrics = [(metric.name, metric.slice, f"{metric.value:.6g}", metric.unit) for metric in outcome.metrics]
    verdicts = [(gate.gate, gate.verdict, gate.reason) for gate in outcome.gates]
    terminal.line(f"{outcome.verdict}: {outcome.reason}")
    if verdicts:
        terminal.draw(("gate", "verdict", "reason"), verdicts)
    if metrics:
        terminal.draw(("metric", "slice", "value", "unit"), metrics)


if __name__ == "__main__":
    terminal.run("weighbridge.workers.evaluate", main)
