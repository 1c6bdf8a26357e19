"""Train with DistributedDataParallel on two ranks (gloo) and save shards: `python -m weighbridge.demo.ddp FOLDER`.

The names keep DDP's `module.` prefix, as they do when someone saves `model.state_dict()` without thinking of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from weighbridge.demo import digits
from weighbridge.workers.compression.ranks import leave

RANKS = 2


def main(folder: Path) -> None:
    """Run both ranks and leave `model-0000N-of-00002.safetensors` and their index in `folder`."""
    with tempfile.TemporaryDirectory(prefix="weighbridge-ddp-") as meeting:
        spawn(_rank, args=(Path(meeting) / "meeting", folder), nprocs=RANKS)  # type: ignore[no-untyped-call]


def _rank(rank: int, meeting: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=RANKS)
    try:
        torch.manual_seed(3)
        module = digits.train(250, seed=3, module=DistributedDataParallel(digits.build()), rank=rank, ranks=RANKS)
        if rank == 0:
            save_sharded(module.state_dict(), folder)
        dist.barrier()  # a rank that leaves while the other still averages aborts it
    finally:
        dist.destroy_process_group()
    leave()


def save_sharded(state: dict[str, torch.Tensor], folder: Path, shards: int = 2) -> None:
    """Write tensors over `shards` files, then the index that names them, as Hugging Face's savers do."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    placed: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
