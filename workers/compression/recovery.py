"""Recovery: fine-tune what pruning or fake quantization hurt, in this process or on the ranks of one torchrun.

What does not belong here: the training itself (workers.compression.training).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import nn

from weighbridge.engines import datatypes
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import Arrays
from weighbridge.registry.recipe import Recovery, Task
from weighbridge.workers.compression import reference, training
from weighbridge.workers.compression.activations import names_by_storage
from weighbridge.workers.compression.types import BuildFailed, Order
from weighbridge.workers.ours import out_of_memory


@dataclass(frozen=True)
class Student:
    """A module to train, and what another process needs to open the same one besides its tensors.

    `masks` by parameter: False stays zero. `frozen`: parameters that stay. `template`: the `.pt2` (and its digest)
    where it is not the original's program. `fake_quantized`: layers that calculate as if they were int8.
    """

    module: nn.Module
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    template: tuple[Path, str] | None = None
    fake_quantized: tuple[str, ...] = ()


class RankJob(BaseModel):
    """What every rank reads: the original, the student, the training. The files lie in `folder`."""

    model_config = ConfigDict(frozen=True)

    manifest: Manifest
    blobs: dict[str, Path]
    factories: tuple[str, ...]
    device: str
    task: Task
    output: str | None
    recovery: Recovery
    folder: Path
    frozen: frozenset[str]
    tied: dict[str, str]
    """{name: the name that its tensor is saved under}, of every entry of the student's state dict."""
    template: tuple[Path, str] | None
    fake_quantized: tuple[str, ...]


STUDENT, MASKS, RESULT, JOB, PROBLEM = (
    *("student.safetensors", "masks.safetensors", "result.safetensors"),
    *("job.json", "problem-{rank}.txt"),
)
BATCHES = "batches"
"""The folder of the training set's batches, a file for each batch of all ranks together."""
BATCHES_BYTES = 1 << 30


def recover(student: Student, order: Order) -> str:
    """Train `student.module` in place by the wish's `recover`; return a note of what was done.

    Raises BuildFailed without a training set, when the loss diverges, or when a rank fails (its last line).
    """
    wishes = order.wish.recover or Recovery()
    if order.data.origin != "train":
        raise BuildFailed(
            f"recover: there is no training set, only {order.data.origin} inputs: put train.safetensors beside the "
            "checkpoints (the evaluation set judges the variant, so it cannot train it)"
        )
    losses = _here(student, order, wishes) if wishes.ranks == 1 else _torchrun(student, order, wishes)
    follows = "labels and the original" if order.data.labelled else "the original's outputs"
    steps = f"{wishes.steps} steps of {wishes.batch} rows" + (f" on {wishes.ranks} ranks" if wishes.ranks > 1 else "")
    return f"recovered by {steps}, following {follows}: loss {losses[0]:.3g}, then {losses[1]:.3g}"


def _here(student: Student, order: Order, wishes: Recovery) -> tuple[float, float]:
    original = order.original
    trained = training.trainable(student.module, student.frozen)
    teacher = reference.open_module(original)
    lesson = training.lesson(original, wishes, student.masks, student.frozen)
    batches = training.endless(lambda number: _pass(order, wishes, number))
    return training.train(student.module, trained, teacher, lesson, batches, order.progress)


def _pass(order: Order, wishes: Recovery, number: int) -> Iterator[Arrays]:
    return training.one_pass(order.data, wishes.batch, wishes.steps, wishes.seed + number)


def _torchrun(student: Student, order: Order, wishes: Recovery) -> tuple[float, float]:
    _check_ranks(order, wishes)
    folder = order.folder / "recovery"
    folder.mkdir()
    _write(student, order, wishes, folder)
    problems = [folder / PROBLEM.format(rank=rank) for rank in range(wishes.ranks)]
    last = _run(folder, wishes.ranks, order)
    if last is not None:
        said = next((path.read_text().strip() for path in problems if path.exists()), last)
        if "MemoryError" in said or out_of_memory(RuntimeError(said)):
            raise MemoryError(said)
        raise BuildFailed(f"recover: a rank of torchrun failed: {said}")
    first, then = _take(student.module, folder)
    return first, then


def _check_ranks(order: Order, wishes: Recovery) -> None:
    if order.original.device.startswith("cuda") and torch.cuda.device_count() < wishes.ranks:
        raise BuildFailed(
            f"recover: ranks is {wishes.ranks}, and this machine has {torch.cuda.device_count()} CUDA devices"
        )


def _write(student: Student, order: Order, wishes: Recovery, folder: Path) -> None:
    original = order.original
    tied = {name: names[0] for names in names_by_storage(student.module).values() for name in names}
    state = student.module.state_dict()
    save_file({name: state[name].detach().cpu().contiguous() for name in set(tied.values())}, folder / STUDENT)
    save_file({name: mask.cpu().contiguous() for name, mask in student.masks.items()}, folder / MASKS)
    job = RankJob(
        manifest=original.manifest,
        blobs={digest: original.cache(digest) for digest in _needed(original.manifest)},
        factories=original.factories,
        device=original.device,
        task=original.task,
        output=original.output,
        recovery=wishes,
        folder=folder,
        frozen=student.frozen,
        tied=tied,
        template=student.template,
        fake_quantized=student.fake_quantized,
    )
    (folder / JOB).write_text(job.model_dump_json())
    _write_batches(order, wishes, folder / BATCHES)


def _write_batches(order: Order, wishes: Recovery, folder: Path) -> None:
    """What the ranks read, pass after pass: every batch, or as many as BATCHES_BYTES hold."""
    folder.mkdir()
    size = 0
    for number, arrays in enumerate(_pass(order, wishes, 0)):
        rows = len(next(iter(arrays.values())))
        if rows < wishes.ranks:
            raise BuildFailed(f"recover: {wishes.ranks} ranks cannot share a batch of {rows} rows: ask for fewer ranks")
        path = folder / f"{number:09d}.safetensors"
        save_file({name: datatypes.array_to_tensor(np.ascontiguousarray(its)) for name, its in arrays.items()}, path)
        size += path.stat().st_size
        if size > BATCHES_BYTES:
            return


def _needed(manifest: Manifest) -> list[str]:
    program = [manifest.program.digest] if manifest.program.digest is not None else []
    return [*program, *(file.digest for file in manifest.files)]


def _run(folder: Path, ranks: int, order: Order) -> str | None:
    """Wait for torchrun; return None, or its last line when it failed. Rank 0 prints its progress."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "weighbridge.workers.compression.recovery_rank", str(folder / JOB)]
    threads = str(max(1, order.original.threads // ranks))
    log = folder / "log.txt"
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child,
    ):
        try:
            for line in child.stdout or ():
                if line.startswith("progress "):
                    order.progress(float(line.split()[1]))
            if child.wait() == 0:
                return None
        finally:
            child.terminate()  # torchrun ends its ranks
    lines = [line for line in log.read_text().splitlines() if line.strip(" =-")]
    return lines[-1] if lines else f"torchrun ended with status {child.returncode}"


def _take(module: nn.Module, folder: Path) -> tuple[float, float]:
    """Copy the ranks' result into the module; return the losses that came with it."""
    result = load_file(folder / RESULT)
    first, then = result.pop("losses").tolist()
    trained = training.trainable(module, frozenset())
    with torch.no_grad():
        for name, value in result.items():
            trained[name].copy_(value)
    return first, then
