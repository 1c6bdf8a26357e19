"""The model card, under the headings of "Model Cards for Model Reporting" (Mitchell et al., 2019).

Filled only with what the registry knows. What it does not know is said to be unknown, for the model's owner to add.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weighbridge.registry.schemas import Variant
from weighbridge.report import words
from weighbridge.report.subject import ORIGINAL, Subject, metric
from weighbridge.words import counted

_UNKNOWN = "The registry does not know it; the model's owner does."
_SMALL = "a bias, a norm or a buffer"
"""What the compression stage says of tensors that no method is for."""
_OVERALL = ("accuracy", "precision", "recall", "f1", "mse", "mae", "r2", "perplexity", "cosine", "retrieval_agreement")


@dataclass(frozen=True)
class Section:
    """A heading with its sentences."""

    title: str
    lines: list[str]


def card(subject: Subject) -> list[Section]:
    return [
        Section("Model details", list(_details(subject))),
        Section("Intended use", [_program(subject), f"What it is for, and what not: {_UNKNOWN}"]),
        Section("Factors", list(_factors(subject))),
        Section("Metrics", list(_metrics(subject))),
        Section("Evaluation data", [_evaluation(subject)]),
        Section("Training data", list(_training(subject))),
        Section("Quantitative analyses", list(_analyses(subject))),
        Section("Ethical considerations", [_UNKNOWN]),
        Section("Caveats and recommendations", caveats(subject) or ["None that the registry sees."]),
    ]


def _details(subject: Subject) -> Iterator[str]:
    version = subject.version
    where = version.path or "an unnamed checkpoint"
    yield f"{version.model}, version {version.number}, from {where}; status {version.status}."
    tensors = version.facts.get("tensors")
    if isinstance(tensors, dict) and "count" in tensors:
        dtypes = ", ".join(f"{count} × {dtype}" for dtype, count in sorted(dict(tensors.get("dtypes", {})).items()))
        elements = f"{tensors.get('elements', 0):,} parameters and buffers ({dtypes})"
        yield f"{counted(tensors['count'], 'tensor')}, {elements}."
    if version.tags:
        yield "Tags: " + ", ".join(f"{key}={value}" for key, value in sorted(version.tags.items())) + "."
    for who, said in (("Its publisher says", version.metadata), ("Its files say of themselves", version.file_metadata)):
        if said:
            yield f"{who}: " + "; ".join(f"{name}: {value}" for name, value in sorted(said.items())) + "."
    yield f"Who trained it, how, and under what licence: {_UNKNOWN}"


def _program(subject: Subject) -> str:
    program = subject.version.facts.get("program")
    task = subject.recipe.get("task")
    said = f" Its recipe calls the task {task}." if task else ""
    if not isinstance(program, dict):
        return f"The program that these weights belong to is not known.{said}"
    name = program.get("name") or words.short(str(program.get("digest", "")), 16)
    return f"These weights belong to the program {program.get('kind', '')}:{name}.{said}"


def _factors(subject: Subject) -> Iterator[str]:
    named = {row.slice for one in subject.variants for row in one.metrics if row.slice.startswith("class=")}
    if named:
        yield f"Measured apart for {counted(len(named), 'class', 'classes')}."
    else:
        yield "Nothing was measured apart for groups or classes."
    if subject.devices:
        yield "Speed was measured on: " + "; ".join(device.label for device in subject.devices) + "."


def _metrics(subject: Subject) -> Iterator[str]:
    quality = subject.recipe.get("quality")
    for name in _OVERALL:
        value = metric(subject.original, name)
        if value is not None:
            yield f"{name} {words.number(value)} of the original."
    if isinstance(quality, dict) and "keep" in quality:
        which = quality.get("metric") or "the task's metric"
        yield (
            f"A variant must keep {words.percent(quality['keep'], 2)} of {which}: the lower end of a paired bootstrap "
            f"interval ({words.percent(quality.get('confidence', 0.95), 0)}) has to reach it."
        )


def _evaluation(subject: Subject) -> str:
    digests = dict.fromkeys(row.dataset_digest for one in subject.variants for row in one.metrics if row.dataset_digest)
    if not digests:
        return "No evaluation set: nothing was measured on data."
    rows = next((one.facts["rows"] for one in subject.variants if isinstance(one.facts.get("rows"), int)), None)
    rows = rows or next((v for v in (subject.version.facts.get("count"),) if isinstance(v, int)), None)
    many = f" of {counted(rows, 'row')}" if rows else ""
    return f"eval.safetensors{many}, BLAKE3 {', '.join(digests)}. What it holds: {_UNKNOWN}"


def _training(subject: Subject) -> Iterator[str]:
    yield f"What the checkpoint was trained on: {_UNKNOWN}"
    for one in subject.variants:
        if recover := one.wish.get("recover"):
            steps = recover.get("steps", "some") if isinstance(recover, dict) else "some"
            yield f"{one.name} was fine-tuned for {steps} steps on train.safetensors."


def _analyses(subject: Subject) -> Iterator[str]:
    yield "By variant, class, layer and hardware: the tables and pictures above."
    good = [one for one in subject.variants if one.name != ORIGINAL and one.status == "ready"]
    if good:
        smallest = min(good, key=lambda one: one.size or 1 << 62)
        yield f"The smallest variant that passed is {smallest.name} with {words.size(smallest.size or None)}."


def caveats(subject: Subject) -> list[str]:
    """What a reader of the figures must know."""
    return [*_of_version(subject), *_of_variants(subject), *_of_measurements(subject)]


def _of_version(subject: Subject) -> Iterator[str]:
    version = subject.version
    if version.status != "ready":
        yield f"The version is {version.status}: {version.reason or 'see its jobs'}."
    if version.unproven:
        yield "That the checkpoint was complete is not proven, only that it was quiet: no automatic rollout."
    evidence = version.evidence
    if evidence and not evidence.get("evaluated"):
        yield "It was never evaluated on data."
    yield from (f"The version: {note}." for note in version.facts.get("notes", ()))
    if not version.variants_settled:
        yield "Variants are still being built, judged or measured: this report is of a moment."


def _of_variants(subject: Subject) -> Iterator[str]:
    for one in subject.variants:
        facts: dict[str, Any] = one.facts
        if facts.get("drift_on") == "golden+synthetic":
            yield (
                f"{one.name} was judged by its drift on golden and synthetic inputs only: never proven to be good, "
                "only to be close."
            )
        if facts.get("calibration") == "synthetic":
            yield f"{one.name} was calibrated on random inputs, not on data."
        if layers := _kept_layers(subject, one.name):
            yield f"{one.name} leaves {counted(len(layers), 'tensor')} untouched: {_listed(layers)}."
        yield from (f"{one.name}: {note}" for note in _notes(one))


def _kept_layers(subject: Subject, variant: str) -> list[str]:
    """With the reason. Biases, norms and buffers are what no method is for."""
    rows = subject.tensors.get(variant, ())
    return [f"{row.name} ({row.reason})" for row in rows if row.action == "kept" and row.reason not in ("", _SMALL)]


def _listed(kept: list[str], most: int = 3) -> str:
    more = f", and {len(kept) - most} more" if len(kept) > most else ""
    return "; ".join(kept[:most]) + more


def _notes(one: Variant) -> list[str]:
    notes = one.facts.get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _of_measurements(subject: Subject) -> Iterator[str]:
    if not subject.devices:
        yield "No speed was measured."
    elif not any(one.hardware.get("device") == "cuda" for one in subject.measured if one.status == "valid"):
        yield "Nothing was measured on a GPU."
    if subject.spoilt:
        yield f"{counted(len(subject.spoilt), 'measurement')} on a busy machine gave no fact."
    if any(one.environment.get("inputs") == "synthetic" for device in subject.devices for one in device.facts.values()):
        yield "Some speeds were measured with synthetic inputs."
