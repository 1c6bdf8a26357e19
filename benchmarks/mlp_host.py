"""What the serving benchmarks measure: the MLP 784-512-512-10, float32, on a host front as the agent runs it.

    python benchmarks/mlp_host.py --data FOLDER [--swaps 20]

It builds a template and versions of the artifact under FOLDER, serves, and prints one JSON line per event: first
{"url", "body"}, then, with --swaps, {"swap", "loading", "live"} for each. It ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop
from blake3 import blake3

from weighbridge.engines.manifest import ArtifactFile, Golden, Manifest, Program, TensorSpec
from weighbridge.hosts.front import Front, listening
from weighbridge.hosts.router import Slots, SlotSpec
from weighbridge.hosts.settings import HostSettings
from weighbridge.hosts.swap import Swapper

MODEL, SETTLE = "mlp", 1.0


def build(folder: Path, versions: int) -> None:
    """Write the blobs, the manifests and a request body. Runs in a process of its own: the front never has torch."""
    import numpy as np
    import torch
    from safetensors.torch import save

    from weighbridge.engines import golden, template
    from weighbridge.engines.load import load
    from weighbridge.storage.local_cache import BlobCache

    def put(data: bytes) -> str:
        digest = blake3(data).hexdigest()
        path = folder / digest[:2] / digest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return digest

    def mlp(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        sizes = [(784, 512), (512, 512), (512, 10)]
        layers: list[torch.nn.Module] = []
        for inner, outer in sizes:
            layers += [torch.nn.Linear(inner, outer), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1]).eval()

    inputs = (TensorSpec(name="x", datatype="FP32", shape=(-1, 784)),)
    made = template.build(mlp(0), inputs, ["logits"])
    program = Program(kind="template", name="mlp", digest=put(made.pt2))
    for version in range(1, versions + 1):
        state = mlp(version).state_dict()
        weights = save(state)
        file = ArtifactFile(path="model.safetensors", size=len(weights), digest=put(weights))
        rough = Manifest(
            variant="original",
            files=(file,),
            program=program,
            binding={name: name for name in state},
            inputs=inputs,
            outputs=made.outputs,
            golden=Golden(digest=file.digest, size=0, rtol=1e-4, atol=1e-5),
        )
        reference = golden.make_reference(load(rough, BlobCache(folder).path))
        proven = rough.golden.model_copy(update={"digest": put(reference), "size": len(reference)})
        (folder / f"{version}.json").write_bytes(rough.model_copy(update={"golden": proven}).canonical())
    pixels = np.random.default_rng(0).random(784, dtype=np.float32)
    tensor = {"name": "x", "shape": [1, 784], "datatype": "FP32", "data": pixels.tolist()}
    (folder / "body.json").write_text(json.dumps({"inputs": [tensor]}))


def spec(folder: Path, version: int) -> SlotSpec:
    manifest = Manifest.model_validate_json((folder / f"{version}.json").read_bytes())
    return SlotSpec(MODEL, str(version), manifest.variant, manifest.digest, manifest, str(folder))


def memory(slots: Slots) -> dict[str, float]:
    """Proportional set sizes, MB: the front, the live child, all with nursery, spare and the previous one."""
    front = psutil.Process()
    sizes = {child.pid: child.memory_full_info().pss / 1e6 for child in front.children(recursive=True)}
    live = slots.find(MODEL, None).child
    own = front.memory_full_info().pss / 1e6
    return {"front": own, "live": own + (sizes[live.pid] if live else 0), "all": own + sum(sizes.values())}


async def serve(folder: Path, swaps: int, batch: int) -> None:
    slots, settings = Slots(), HostSettings(batch=batch)
    swapper = Swapper(slots, settings)
    sock = socket.create_server(("127.0.0.1", 0))
    async with listening(Front(slots, settings), sock):
        try:
            await swapper.go_live(await swapper.load(spec(folder, 1)))
            await asyncio.sleep(3)  # the next spare is warm
            say({"url": f"127.0.0.1:{sock.getsockname()[1]}", "memory": memory(slots)})
            commands = asyncio.to_thread(sys.stdin.read, 1)
            if swaps and await commands:
                await swap(swapper, folder, swaps)
                say({"memory": memory(slots)})
                commands = asyncio.to_thread(sys.stdin.read)
            await commands
        finally:
            await swapper.close()


async def swap(swapper: Swapper, folder: Path, count: int) -> None:
    for number in range(count):
        specification = spec(folder, 2 + number % 2)
        began = time.perf_counter()
        slot = await swapper.load(specification)
        live = time.perf_counter()
        await swapper.go_live(slot)
        say({"swap": number + 1, "loading": began, "live": live})
        await asyncio.sleep(SETTLE)


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--build", action="store_true", help="only write the artifacts")
    parser.add_argument("--swaps", type=int, default=0, help="swap this often after a byte on standard input")
    parser.add_argument("--batch", type=int, default=1, help="host.batch: rows of waiting requests computed as one")
    options = parser.parse_args()
    if options.build:
        build(options.data, 3)
    else:
        gc.collect()
        gc.freeze()  # as hosts.run does
        uvloop.run(serve(options.data, options.swaps, options.batch))


if __name__ == "__main__":
    main()
