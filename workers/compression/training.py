"""A short training of a variant: labels and the original's outputs as the teacher, AdamW, masks that stay masks.

The module trains in the form that it serves in: no dropout, batch norms with their own statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from weighbridge.engines.manifest import TensorSpec
from weighbridge.engines.program import flat
from weighbridge.engines.protocols import Array, Arrays
from weighbridge.registry.recipe import Recovery, Task
from weighbridge.workers.compression.activations import names_by_storage, positional
from weighbridge.workers.compression.types import BuildFailed, Data, Original, Progress
from weighbridge.workers.evaluation import reading

LABELS = "labels"
_LEAST = 1e-12
IGNORED = -100
"""A label that no loss counts."""
_WINDOW = 16
"""Batches that are shuffled among each other; the order of the windows is the data's, which is random too."""


@dataclass(frozen=True)
class Lesson:
    """What a training follows. `masks` by parameter: False stays zero; `frozen` parameters stay as they are."""

    recovery: Recovery
    task: Task
    inputs: tuple[TensorSpec, ...]
    device: str = "cpu"
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    read: int = 0
    """The output that the labels are for."""


def lesson(original: Original, recovery: Recovery, masks: Mapping[str, torch.Tensor], frozen: frozenset[str]) -> Lesson:
    """What a recovery of this original follows. Raises BuildFailed where no output is the one that is read."""
    manifest = original.manifest
    try:
        spec = reading.choose(original.task, manifest.outputs, None, original.output)
    except reading.Unclear as unclear:
        raise BuildFailed(f"recover: {unclear}") from unclear
    read = manifest.outputs.index(spec)
    return Lesson(recovery, original.task, manifest.inputs, original.device, masks, frozen, read)


def trainable(module: nn.Module, frozen: frozenset[str]) -> dict[str, nn.Parameter]:
    """Give the module parameters of its own (not the file's bytes), tied ones as one; return those that train."""
    given = module.state_dict(keep_vars=True)
    trained: dict[str, nn.Parameter] = {}
    for names in names_by_storage(module).values():
        old = given[names[0]]
        if not isinstance(old, nn.Parameter):
            continue
        trains = old.is_floating_point() and not frozen.intersection(names)
        new = nn.Parameter(old.detach().clone(), requires_grad=trains)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, new)
        if trains:
            trained |= dict.fromkeys(names, new)
    return trained


def train(
    forward: nn.Module,
    trained: Mapping[str, nn.Parameter],
    teacher: nn.Module,
    lesson: Lesson,
    batches: Iterator[Arrays],
    progress: Progress,
) -> tuple[float, float]:
    """Take the steps; return the loss of the first and the mean loss of the last tenth.

    `forward` is the module, or what wraps it. Raises BuildFailed when the loss is not finite, or has no gradient.
    """
    wishes, losses = lesson.recovery, []
    optimizer = _adamw(trained, wishes)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / wishes.steps, total_iters=wishes.steps)
    _mask(trained, lesson.masks)
    for step, arrays in zip(range(wishes.steps), batches, strict=False):
        loss = _loss(forward, teacher, lesson, arrays)
        if not torch.isfinite(loss):
            raise BuildFailed(f"recover: the loss is {loss.item()} at step {step}: lower recover.learning_rate")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        _mask(trained, lesson.masks)
        losses.append(loss.item())
        progress((step + 1) / wishes.steps)
    return losses[0], float(np.mean(losses[-max(1, len(losses) // 10) :]))


def endless(passes: Callable[[int], Iterator[Arrays]]) -> Iterator[Arrays]:
    """Pass after pass; `passes` takes the number of the pass."""
    for number in count():
        yield from passes(number)


def one_pass(data: Data, batch: int, steps: int, seed: int) -> Iterator[Arrays]:
    """So many batches, or fewer, shuffled by `seed` within windows; what is short of a batch is left out.

    Batches are as large as the data gives them, which may be less than asked. Raises BuildFailed for an empty set.
    """
    rng = np.random.default_rng(seed)
    given = data.batches(steps * batch, batch)
    empty = True
    while window := list(islice(given, _WINDOW)):
        size, joined = _length(window[0]), _join(window)
        order = rng.permutation(_length(joined))
        for start in range(0, len(order), size):
            if start + size <= len(order):
                empty = False
                yield _rows(joined, order[start : start + size])
    if empty:
        raise BuildFailed("recover: the training set has no rows")


def share(arrays: Arrays, rank: int, ranks: int) -> dict[str, Array]:
    """One rank's rows of a batch."""
    return _rows(arrays, np.arange(rank, _length(arrays), ranks))


def _adamw(trained: Mapping[str, nn.Parameter], wishes: Recovery) -> torch.optim.Optimizer:
    """Matrices decay; biases and norms, whose scale means something, do not."""
    unique = list({id(value): value for value in trained.values()}.values())
    groups = [
        {"params": [value for value in unique if value.ndim >= 2], "weight_decay": wishes.weight_decay},
        {"params": [value for value in unique if value.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=wishes.learning_rate)


@torch.no_grad()
def _mask(trained: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        if name in trained:
            trained[name].mul_(mask)


def _loss(forward: nn.Module, teacher: nn.Module, lesson: Lesson, arrays: Arrays) -> torch.Tensor:
    """(1 − distill) · the task's loss + distill · the mean distance to the original's outputs."""
    inputs = positional(lesson.inputs, arrays, lesson.device)
    outputs = flat(forward(*inputs))
    with torch.no_grad():
        taught = flat(teacher(*inputs))
    if not outputs[lesson.read].requires_grad:
        raise BuildFailed("recover: the output that is read has no gradient: give a program that returns scores")
    output, wanted = (values[lesson.read].float() for values in (outputs, taught))
    if lesson.task == "classification":
        output, wanted = (_of_classes(value, wanted) for value in (output, wanted))
    distances = [_distance(lesson.task, output, wanted)]
    for index, (seen, right) in enumerate(zip(outputs, taught, strict=True)):
        if index != lesson.read and seen.is_floating_point():
            distances.append(_relative(seen.float(), right.float()))
    followed = torch.stack(distances).mean()
    task, distill = _task_loss(lesson.task, output, inputs, arrays), lesson.recovery.distill
    return followed if task is None else (1 - distill) * task + distill * followed


def _relative(output: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """The mean squared error as a share of what the original's output varies by."""
    return functional.mse_loss(output, taught) / taught.var(correction=0).clamp_min(_LEAST)


def _of_classes(output: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """One number a row as the logits of two classes; it is a probability where all of the original's are."""
    if output[0].numel() != 1:
        return output
    column = output.reshape(-1)
    if ((taught >= 0) & (taught <= 1)).all():
        column = torch.logit(column, eps=1e-6)
    return torch.stack([torch.zeros_like(column), column], dim=1)


def _task_loss(task: Task, output: torch.Tensor, inputs: list[torch.Tensor], arrays: Arrays) -> torch.Tensor | None:
    """None where there is nothing but the original to follow."""
    given = arrays.get(LABELS)
    if task == "language":
        return _next_token(output, inputs, given)
    if given is None or task == "embedding":
        return None
    labels = torch.from_numpy(np.ascontiguousarray(given)).to(output.device)
    if task == "regression":
        return functional.mse_loss(output.float(), labels.reshape(output.shape).float())
    return functional.cross_entropy(output.float(), labels.long(), ignore_index=IGNORED)


def _next_token(output: torch.Tensor, inputs: list[torch.Tensor], given: Array | None) -> torch.Tensor | None:
    if given is not None:
        labels = torch.from_numpy(np.ascontiguousarray(given)).to(output.device)
    else:
        tokens = [value for value in inputs if not value.is_floating_point() and value.shape == output.shape[:-1]]
        if len(tokens) != 1:
            return None
        output, labels = output[:, :-1], tokens[0][:, 1:]
    flatly = output.float().reshape(-1, output.shape[-1])
    return functional.cross_entropy(flatly, labels.reshape(-1).long(), ignore_index=IGNORED)


def _distance(task: Task, output: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler for scores of classes and tokens (a mean over rows), 1 − cosine, or the mean squared error."""
    if task == "regression":
        return functional.mse_loss(output, taught)
    if task == "embedding":
        return (1 - functional.cosine_similarity(output, taught, dim=-1)).mean()
    classes = output.shape[-1]
    own, other = (functional.log_softmax(value.reshape(-1, classes), dim=-1) for value in (output, taught))
    return functional.kl_div(own, other, reduction="batchmean", log_target=True)


def _length(arrays: Arrays) -> int:
    """Rows of a batch."""
    return len(next(iter(arrays.values())))


def _rows(arrays: Arrays, which: Array) -> dict[str, Array]:
    return {name: value[which] for name, value in arrays.items()}


def _join(window: list[Arrays]) -> dict[str, Array]:
    return {name: np.concatenate([arrays[name] for arrays in window]) for name in window[0]}
