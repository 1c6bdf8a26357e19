"""What every method is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from weighbridge.engines.manifest import Encoding, Manifest, Program
from weighbridge.engines.protocols import Arrays, BlobPath
from weighbridge.registry.recipe import Task, VariantWish
from weighbridge.registry.schemas import VariantTensor


class NotApplicable(Exception):
    """The method does not fit: an op that cannot be exported, a group that does not divide, no such device.

    The message names the layer, where there is one, and the reason.
    """


class BuildFailed(Exception):
    """It should have worked and did not; the message names the layer and the reason. No retry cures it."""


DataOrigin = Literal["train", "eval", "golden", "synthetic"]


@dataclass(frozen=True)
class Data:
    """Inputs by batches, from the best place there is: the training set, else the evaluation set's inputs, else random.

    `batches(rows, batch)` yields inputs by name until `rows` rows; with `labels` in them where `labelled`.
    """

    origin: DataOrigin
    batches: Callable[[int, int], Iterator[Arrays]]
    labelled: bool = False


@dataclass(frozen=True)
class Original:
    """The artifact that a variant is made of. `cache` gives its blobs as local files."""

    manifest: Manifest
    cache: BlobPath
    factories: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    task: Task = "classification"
    output: str | None = None
    """Which output the recipe's metric reads; None: by rule."""


@dataclass(frozen=True)
class Built:
    """A variant, or one shard of it, as files in the folder that the method was given. What is None is the original's.

    `files`: {path in the artifact: local file}; the weights, or the one `.onnx`. `program_file`: a new template's
    `.pt2`. `exact_tensors`: every tensor of the original has a row in `tensors`.
    """

    files: dict[str, Path]
    tensors: tuple[VariantTensor, ...]
    engine: dict[str, str]
    program: Program | None = None
    program_file: Path | None = None
    binding: dict[str, str] | None = None
    encoding: Encoding | None = None
    promised_ratio: float = 1.0
    """Bytes out over bytes in that the method promises, over all tensors, those it must keep included."""
    compute_dtypes: tuple[str, ...] = ()
    """Safetensors names of the dtypes it computes in, for the golden's tolerance; empty: those of its weights."""
    per_batch: bool = False
    """Activations share a scale over a whole batch, so that a row's answer depends a little on its neighbours: its
    golden is of one row, which is the same alone. What that costs in quality, the evaluation measures in batches."""
    notes: tuple[str, ...] = ()
    """What a person should know: `batch lowered to 16: out of memory`, `calibrated on synthetic inputs`."""
    calibration: DataOrigin | None = None


Progress = Callable[[float], None]
"""Called with the share done, 0 to 1."""


@dataclass(frozen=True)
class Order:
    """One variant to build into `folder`, which is empty and removed afterwards."""

    original: Original
    wish: VariantWish
    folder: Path
    data: Data
    progress: Progress = field(default=lambda _: None)


Method = Callable[[Order], Built]
"""Raises NotApplicable, BuildFailed; MemoryError or torch's OutOfMemoryError where a smaller batch may help.

A method that can work file by file has `build_shard(order, number)` beside `build`: the Built of that weight file
of the original, with rows for its tensors only. Shards agree in engine, encoding, binding and calibration.
"""
