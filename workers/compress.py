"""The stage *compress*: build one variant of an original, prove it, and store it as an artifact. No Celery, no SQL.

Methods live in workers.compression and are imported when they are asked for. What they build is not believed: the
files must be as small as promised, load twice to the same bits, and say of every tensor what became of it.
"""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from weighbridge import terminal
from weighbridge.engines.blobs import read_manifest
from weighbridge.engines.errors import EngineError
from weighbridge.engines.protocols import BlobPath
from weighbridge.registry.recipe import Task, VariantWish
from weighbridge.storage.blobs import Blobs, Keep
from weighbridge.storage.errors import StorageError
from weighbridge.words import counted
from weighbridge.workers.compression import artifact, proof
from weighbridge.workers.compression.data import Limited, open_data
from weighbridge.workers.compression.memory import release
from weighbridge.workers.compression.types import BuildFailed, Built, Method, NotApplicable, Order, Original, Progress
from weighbridge.workers.ours import out_of_memory, raise_ours
from weighbridge.workers.outcome import Outcome

logger = logging.getLogger(__name__)

_BUILT, _PROVEN = 0.8, 0.95
"""Shares of the work that are done by then."""
_HERE = "weighbridge.workers.compression."
METHODS: Mapping[str, str] = {
    **dict.fromkeys(("bf16", "fp16"), "casting:build"),
    **dict.fromkeys(
        ("int8-weight-only", "int4-weight-only", "int8-dynamic", "fp8-weight-only", "fp8-dynamic"),
        "torchao_methods:build",
    ),
    **dict.fromkeys(("int8-rows", "int4-groups", "int2-groups", "fp8-tensors"), "streaming:build"),
    **dict.fromkeys(("prune-magnitude", "prune-wanda", "sparse-2-4"), "pruning:build"),
    "prune-channels": "channels:build",
    "int8-qat": "qat:build",
    **dict.fromkeys(
        (
            "onnx",
            "onnx-fp16",
            "onnx-int8-dynamic",
            "onnx-int8-static",
            "onnx-int8-weight-only",
            "onnx-int4-weight-only",
        ),
        "onnx_methods:build",
    ),
}
"""Where each method is: module:function of workers.compression. Every `recipe.Method` is here."""
_SHARDED = "build_shard"
"""Beside `build`, where a method can build one shard, a file of the original's weights: (order, its number) → Built."""


@dataclass(frozen=True)
class CompressTask:
    """One variant of the artifact `artifact` (digest of its manifest).

    `dataset`, `train`: digests of eval.safetensors and train.safetensors. `part`: the number of a shard, from 0, of
    `shards`, as many as the original has `.safetensors` files; empty: the whole.
    """

    artifact: str
    wish: VariantWish
    task: Task = "classification"
    dataset: str | None = None
    train: str | None = None
    factories: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    part: str = ""
    shards: int = 1
    output: str | None = None
    """Which output a metric reads, as an EvaluateTask's."""


def compress(
    task: CompressTask, *, blobs: Keep, cache: BlobPath, scratch: Path, progress: Progress = lambda _: None
) -> Outcome:
    """Build a variant, or one shard of it, in a temporary folder of `scratch`; what passes ends up in `blobs`.

    `cache` gives a blob as a local file. Raises only what a retry can cure: what storage and `cache` raise.
    """
    return _told(lambda folder: _compress(task, blobs, cache, folder, progress), task, scratch)


def assemble(
    task: CompressTask,
    parts: Sequence[Mapping[str, Any]],
    *,
    blobs: Keep,
    cache: BlobPath,
    scratch: Path,
    progress: Progress = lambda _: None,
) -> Outcome:
    """Join the shards, the `shard` of each one's facts, into the variant's artifact, as if built whole."""

    def run(_: Path) -> Outcome:
        return _finish(task, _original(task, cache), artifact.join(parts, cache), blobs, progress)

    return _told(run, task, scratch)


def _told(run: Callable[[Path], Outcome], task: CompressTask, scratch: Path) -> Outcome:
    """Turn what no retry cures into verdicts."""
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="compress-", dir=scratch) as folder:
            return run(Path(folder))
    except NotApplicable as reason:
        return Outcome.not_applicable(f"{task.wish.name}: {reason}")
    except (BuildFailed, EngineError) as wrong:
        if not out_of_memory(wrong.__cause__ or wrong):  # a smaller batch was tried, and the recipe may ask for less
            raise_ours(wrong)
        return Outcome.rejected(f"{task.wish.name}: {wrong}")
    except (MemoryError, RuntimeError) as wrong:
        if not out_of_memory(wrong):
            raise
        return Outcome.rejected(f"{task.wish.name}: out of memory: {wrong}")


def _compress(task: CompressTask, blobs: Keep, cache: BlobPath, folder: Path, progress: Progress) -> Outcome:
    original = _original(task, cache)
    data = open_data(original.manifest.inputs, train=task.train, dataset=task.dataset, cache=cache)
    order = Order(original, task.wish, folder, data, lambda share: progress(_BUILT * share))
    if not task.part:
        return _finish(task, original, _whole(task, order, blobs, cache), blobs, progress)
    built = _build(order, _shard(task, int(task.part)))
    said = f"shard {int(task.part) + 1} of {task.shards}: {counted(len(built.tensors), 'tensor')}"
    return Outcome.passed(said, {"shard": artifact.keep_shard(built, blobs)})


def _whole(task: CompressTask, order: Order, blobs: Keep, cache: BlobPath) -> Built:
    """A streaming method takes a checkpoint of several files one after the other."""
    count = sum(file.path.endswith(".safetensors") for file in order.original.manifest.files)
    if count <= 1 or not hasattr(_module(task), _SHARDED):
        return _build(order, getattr(_module(task), METHODS[task.wish.method].rpartition(":")[2]))
    shards = []
    for number in range(count):
        folder = order.folder / str(number)
        folder.mkdir()
        built = _build(replace(order, folder=folder), _shard(task, number))
        shards.append(artifact.keep_shard(built, blobs))
        shutil.rmtree(folder)
    return artifact.join(shards, cache)


def _original(task: CompressTask, cache: BlobPath) -> Original:
    return Original(
        read_manifest(cache, task.artifact), cache, task.factories, task.device, task.threads, task.task, task.output
    )


def _module(task: CompressTask) -> ModuleType:
    """Raises NotApplicable where the worker lacks what the method needs."""
    where = METHODS[task.wish.method].partition(":")[0]
    try:
        return importlib.import_module(_HERE + where)
    except ModuleNotFoundError as exc:
        raise NotApplicable(f"{task.wish.method} needs {exc.name}, which is not installed on this worker") from exc


def _shard(task: CompressTask, number: int) -> Method:
    build_shard = getattr(_module(task), _SHARDED, None)
    if build_shard is None:
        raise NotApplicable(f"{task.wish.method} cannot be built by shards: use a streaming method, or one shard")
    return lambda order: build_shard(order, number)


def _build(order: Order, method: Method) -> Built:
    """Call the method; while memory does not suffice, again with half the batch. Raises NotApplicable, BuildFailed."""
    limit: int | None = None
    while True:
        limited = Limited(order.data, limit)
        folder = order.folder / f"batch-{limit or 'whole'}"
        folder.mkdir()
        try:
            built = method(replace(order, folder=folder, data=limited.data))
        except (StorageError, EngineError):
            raise
        except (MemoryError, RuntimeError) as wrong:
            if not out_of_memory(wrong):
                raise _unforeseen(wrong) from wrong
            if limited.largest <= 1:
                at = "with one row at a time" if limited.largest else "and there is no batch to lower"
                raise BuildFailed(f"out of memory {at}: {wrong}") from wrong
            limit = limited.largest // 2
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError) as wrong:
            raise _unforeseen(wrong) from wrong
        else:
            lowered = () if limit is None else (f"batch lowered to {limit}: out of memory",)
            return replace(built, notes=(*built.notes, *lowered))
        release()


def _unforeseen(wrong: Exception) -> BuildFailed:
    """A library's error that the method did not foresee: no retry cures it, and the log has where it arose."""
    logger.error("a method of compression failed", exc_info=wrong)
    return BuildFailed(f"{type(wrong).__name__}: {wrong}")


def _finish(task: CompressTask, original: Original, built: Built, blobs: Keep, progress: Progress) -> Outcome:
    """Check, prove, store: the files of a variant become an artifact. What fails leaves its report."""
    draft, local = artifact.draft(task.wish.name, original, built)
    size, before = artifact.weights_size(draft), artifact.weights_size(original.manifest)
    facts = artifact.facts(original, built, size)

    def at(digest: str) -> Path:
        return local[digest] if digest in local else original.cache(digest)

    try:
        proof.check(original, built, draft, task.wish)
        recorded, reference = proof.record_golden(draft, at, original, built)
    except (BuildFailed, EngineError) as wrong:
        return Outcome.rejected(f"{task.wish.name}: {wrong}", facts)
    progress(_PROVEN)
    sizes = {blob.digest: blob.size for blob in map(blobs.put_file, local.values())}
    kept = blobs.put_bytes(recorded)
    manifest = draft.model_copy(update={"golden": reference.model_copy(update={"digest": kept.digest})})
    stored = blobs.put_bytes(manifest.canonical())
    facts |= {
        "artifact_digest": stored.digest,
        "blobs": manifest.blobs() | sizes | {stored.digest: stored.size},
        "golden": manifest.golden.model_dump(mode="json"),
    }
    return Outcome.passed(f"{size:,} of {before:,} bytes ({size / before:.1%}), loads bit-exactly", facts)


def main(argv: Sequence[str] | None = None) -> int:
    """Build a variant of local blobs: `python -m weighbridge.workers.compress ARTIFACT --method M --blobs FOLDER`."""
    from weighbridge.storage.in_place import InPlace
    from weighbridge.storage.urls import open_store

    parser = terminal.Arguments(prog="weighbridge.workers.compress", description=main.__doc__)
    parser.add_argument("artifact", help="digest of the original's manifest")
    parser.add_argument("--method", required=True, choices=sorted(METHODS))
    parser.add_argument("--wish", type=json.loads, default={}, help='more of the wish as JSON: {"group": 64}')
    parser.add_argument("--blobs", type=Path, required=True, help="the folder that holds blobs/")
    parser.add_argument("--train", help="digest of a train.safetensors")
    parser.add_argument("--dataset", help="digest of an eval.safetensors")
    parser.add_argument("--factories", nargs="*", default=[], help="patterns of allowed package.module:factory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    blobs = Blobs(open_store(args.blobs.resolve().as_uri()))
    task = CompressTask(
        artifact=args.artifact,
        wish=VariantWish.model_validate({**args.wish, "method": args.method}),
        dataset=args.dataset,
        train=args.train,
        factories=tuple(args.factories),
        device=args.device,
        threads=args.threads,
    )
    outcome = compress(task, blobs=blobs, cache=InPlace(blobs).path, scratch=args.blobs / "scratch")
    _print(outcome)
    return 0 if outcome.verdict == "passed" else 1


def _print(outcome: Outcome) -> None:
    numbers = ("bytes in", "bytes out", "SQNR, dB")
    rows = []
    for row in outcome.facts.get("tensors", ()):
        noise = "" if row["sqnr"] is None else f"{row['sqnr']:.1f}"
        rows.append((row["name"], row["action"], row["reason"], f"{row['bytes_in']:,}", f"{row['bytes_out']:,}", noise))
    title = outcome.facts.get("artifact_digest", "")
    terminal.draw(("tensor", "action", "reason", *numbers), rows, title=title, right=numbers)
    for said in (*outcome.facts.get("notes", ()), f"{outcome.verdict}: {outcome.reason}"):
        terminal.line(said)
    if title:
        terminal.line(title)


if __name__ == "__main__":
    terminal.run("weighbridge.workers.compress", main)
