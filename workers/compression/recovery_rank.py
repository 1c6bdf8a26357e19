"""One rank of a recovery: `torchrun -m weighbridge.workers.compression.recovery_rank JOB.json` (recovery.RankJob)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weighbridge.engines import datatypes
from weighbridge.engines.program import open_template
from weighbridge.engines.protocols import Arrays
from weighbridge.workers.compression import qat, recovery, reference, training
from weighbridge.workers.compression.ranks import leave
from weighbridge.workers.compression.recovery import RankJob
from weighbridge.workers.compression.types import Original


def main(path: Path) -> None:
    """Train this rank's share; rank 0 writes the result. What fails is written down for the parent."""
    rank = int(os.environ["RANK"])
    try:
        _train(RankJob.model_validate_json(path.read_text()), rank, int(os.environ["WORLD_SIZE"]))
    except Exception as problem:
        (path.parent / recovery.PROBLEM.format(rank=rank)).write_text(f"{type(problem).__name__}: {problem}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(job: RankJob, rank: int, ranks: int) -> None:
    cuda = job.device.startswith("cuda")
    device = f"cuda:{rank}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    original = Original(job.manifest, job.blobs.__getitem__, job.factories, device, task=job.task, output=job.output)
    student = _student(job, original)
    trained = training.trainable(student, job.frozen)
    masks = {name: mask.to(device) for name, mask in load_file(job.folder / recovery.MASKS).items()}
    lesson = training.lesson(original, job.recovery, masks, job.frozen)
    losses = training.train(
        DistributedDataParallel(student, device_ids=[rank] if cuda else None, find_unused_parameters=True),
        trained,
        reference.open_module(original),
        lesson,
        training.endless(lambda number: _batches(job, number, rank, ranks)),
        lambda done: print(f"progress {done:.4f}", flush=True) if rank == 0 else None,
    )
    if rank == 0:
        result = {name: trained[name].detach().cpu() for name in set(job.tied.values()) & trained.keys()}
        save_file(result | {"losses": torch.tensor(losses)}, job.folder / recovery.RESULT)
    dist.barrier()  # a rank that leaves while the other still averages aborts it


def _student(job: RankJob, original: Original) -> nn.Module:
    own = job.template
    module = reference.open_module(original) if own is None else open_template(*own, original.device)
    saved = load_file(job.folder / recovery.STUDENT, device=original.device)
    module.load_state_dict({name: saved[root] for name, root in job.tied.items()}, assign=True)
    qat.fake_quantize(module, job.fake_quantized)
    return module


def _batches(job: RankJob, number: int, rank: int, ranks: int) -> Iterator[Arrays]:
    """The saved batches, after the first pass in another order, the same on every rank; of each this rank's rows."""
    files = sorted((job.folder / recovery.BATCHES).iterdir())
    shuffled = np.random.default_rng(job.recovery.seed + number).permutation(len(files))
    for index in shuffled if number else range(len(files)):
        arrays = {name: datatypes.tensor_to_array(value) for name, value in load_file(files[index]).items()}
        yield training.share(arrays, rank, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
