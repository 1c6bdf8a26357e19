"""Every variant of three models: size, quality and speed against the original: `python benchmarks/variants.py`.

A small vision model and an MLP of 25 million weights, both trained here on scikit-learn's digits, and all-MiniLM-L6-v2.
The stages are the workers' own: validate, compress, evaluate (800 held-out digits; 600 sentences), benchmark (ABBA
against the original under the machine's lease). Speed-ups inside the A/A spread are printed as "same".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # minilm, which lies beside this file

from safetensors.numpy import save_file

from weighbridge.engines import hardware
from weighbridge.engines.manifest import TensorSpec
from weighbridge.registry.recipe import NEEDS_CUDA, Quality, Task, VariantWish
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.pins import pin
from weighbridge.storage.urls import open_store
from weighbridge.workers.benchmark import BenchmarkTask, benchmark
from weighbridge.workers.benchmarking.machine import Machine
from weighbridge.workers.compress import CompressTask, compress
from weighbridge.workers.evaluate import CompareTask, compare
from weighbridge.workers.validate import Programs, TemplateInfo, ValidateTask, validate

WISHES: tuple[Mapping[str, Any], ...] = (
    {"method": "bf16"},
    {"method": "fp16"},
    {"method": "int8-weight-only"},
    {"method": "int8-dynamic"},
    {"method": "int4-weight-only"},
    {"method": "fp8-weight-only"},
    {"method": "int8-rows"},
    {"method": "int4-groups"},
    {"method": "int2-groups"},
    {"method": "prune-magnitude", "name": "pruned-50", "sparsity": 0.5},
    {"method": "prune-magnitude", "name": "pruned-95", "sparsity": 0.95},
    {"method": "prune-wanda", "name": "wanda-50", "sparsity": 0.5},
    {"method": "prune-channels", "name": "channels-50", "sparsity": 0.5},
    {"method": "onnx"},
    {"method": "onnx-fp16"},
    {"method": "onnx-int8-dynamic"},
    {"method": "onnx-int8-static"},
    {"method": "onnx-int8-weight-only"},
    {"method": "onnx-int4-weight-only"},
)
ON_CUDA: tuple[Mapping[str, Any], ...] = tuple({"method": method} for method in NEEDS_CUDA)


@dataclass(frozen=True)
class Case:
    """A model with its weights and what it is measured on. `example`: inputs that its export is tried with."""

    name: str
    module: Any
    inputs: tuple[TensorSpec, ...]
    output: str
    example: Mapping[str, Any] | None
    evaluation: Mapping[str, Any]
    task: Task
    train: Mapping[str, Any] | None = None


def vision() -> Case:
    """Three convolutions on digits of 8 × 8 pixels: 93 thousand weights."""
    from torch import nn

    module = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    return _digits("vision", module, (-1, 1, 8, 8), steps=200)


def mlp() -> Case:
    """Four linear layers on the same digits: 25 million weights."""
    from torch import nn

    width = 3500
    module = nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )
    return _digits("mlp", module, (-1, 64), steps=40)


def minilm() -> Case:
    """A sentence encoder: 23 million weights, half of them embeddings."""
    import minilm as model
    from safetensors.torch import load_file

    folder = model.folder()
    if folder is None:
        raise SystemExit("MiniLM is not installed: `make bench` does it")
    module = model.build().eval()
    module.load_state_dict(load_file(folder / "model.safetensors"))
    inputs = model.tokens(model.sentences(800))
    specs = tuple(TensorSpec(name=name, datatype="INT64", shape=(-1, -1)) for name in model.INPUTS)
    return Case(
        "minilm",
        module,
        specs,
        model.OUTPUT,
        {name: value[:3] for name, value in inputs.items()},
        {name: value[:600] for name, value in inputs.items()},
        "embedding",
        {name: value[600:] for name, value in inputs.items()},
    )


def _digits(name: str, module: Any, shape: tuple[int, ...], *, steps: int) -> Case:
    import torch
    from torch import nn

    from weighbridge.demo import digits

    train, evaluation, held_out = digits.load()
    rows = tuple(length for length in shape if length != -1)
    pixels, labels = torch.from_numpy(train.pixels).view(-1, *rows), torch.from_numpy(train.labels)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for step in range(steps):
        part = torch.randint(len(pixels), (128,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(module(pixels[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    tested = np.concatenate([evaluation.pixels, held_out.pixels]).reshape(-1, *rows)
    return Case(
        name,
        module.eval(),
        (TensorSpec(name=digits.INPUT, datatype="FP32", shape=shape),),
        digits.OUTPUT,
        None,
        {digits.INPUT: tested, "labels": np.concatenate([evaluation.labels, held_out.labels])},
        "classification",
        {digits.INPUT: pixels.numpy(), "labels": train.labels},
    )


CASES = {"vision": vision, "mlp": mlp, "minilm": minilm}


class Bench:
    """One model in a folder of blobs, and the stages run on it."""

    def __init__(self, case: Case, folder: Path, *, device: str, threads: int, seconds: float) -> None:
        from safetensors.torch import save_model

        from weighbridge.engines.template import build

        self.case, self.folder, self.device, self.threads, self.seconds = case, folder, device, threads, seconds
        store = open_store(folder.resolve().as_uri())
        self.blobs = Blobs(store)
        made = build(case.module, case.inputs, [case.output], case.example, unread=["pooler.*"])
        self.blobs.put_bytes(made.pt2)
        save_model(case.module, str(folder / "original.safetensors"))
        template = TemplateInfo(case.name, made.digest, made.fingerprint, made.parameters, made.inputs, made.outputs)
        files = (pin(store.head("original.safetensors")),)
        task = ValidateTask(case.name, 1, "original.safetensors", files, programs=Programs((template,)), device=device)
        outcome = validate(task, source=store, blobs=self.blobs, cache=self.cache)
        if "artifact_digest" not in outcome.facts:
            raise SystemExit(f"{case.name}: {outcome.verdict}: {outcome.reason}")
        self.original: str = outcome.facts["artifact_digest"]
        self.evaluation, self.train = self._dataset("eval", case.evaluation), self._dataset("train", case.train)

    def cache(self, digest: str) -> Path:
        return self.folder / self.blobs.key(digest)

    def _dataset(self, name: str, tensors: Mapping[str, Any] | None) -> str | None:
        if tensors is None:
            return None
        path = self.folder / f"{name}.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
        return self.blobs.put_file(path).digest

    def row(self, wish: VariantWish | None) -> dict[str, Any]:
        """Build, compare and measure one variant; None is the original, measured against itself (the A/A run)."""
        row: dict[str, Any] = {"model": self.case.name, "variant": wish.name if wish else "original"}
        artifact = self.original
        if wish is not None:
            task = CompressTask(
                self.original,
                wish,
                self.case.task,
                dataset=self.evaluation,
                train=self.train,
                device=self.device,
                threads=self.threads,
            )
            scratch = self.folder / "scratch"
            scratch.mkdir(exist_ok=True)
            built = compress(task, blobs=self.blobs, cache=self.cache, scratch=scratch, progress=lambda share: None)
            row |= {"built": str(built.verdict), "reason": built.reason}
            if "artifact_digest" not in built.facts:
                return row
            artifact = built.facts["artifact_digest"]
            row |= {"ratio": built.facts["ratio"], "size": built.facts["size"]}
            judged = compare(
                CompareTask(artifact, self.original, self.evaluation, self.case.task, Quality(), device=self.device),
                cache=self.cache,
            )
            kept = {metric.name: metric.value for metric in judged.metrics if not metric.slice.startswith("class=")}
            row |= {"verdict": str(judged.verdict), "reason": judged.reason, "metrics": kept}
        task = BenchmarkTask(
            artifact=artifact,
            original=self.original,
            device=self.device,
            threads=self.threads,
            dataset=self.evaluation,
            seconds=self.seconds,
        )
        measured = benchmark(task, cache=self.cache, progress=lambda share: None, machine=Machine(None))
        row["benchmark"] = measured.facts.get("benchmark") or {
            "status": str(measured.verdict),
            "reason": measured.reason,
        }
        return row


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of every model; `--json` keeps everything that was measured."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("models", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--only", nargs="*", metavar="VARIANT", help="only these variants")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring, a variant")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    console = Console(width=150)
    console.print(f"{hardware.describe(args.device).label}; {args.threads} thread(s)")
    everything = []
    for name in args.models:
        with tempfile.TemporaryDirectory(prefix="weighbridge-variants-") as folder:
            bench = Bench(CASES[name](), Path(folder), device=args.device, threads=args.threads, seconds=args.seconds)
            wishes = [
                VariantWish.model_validate(wish) for wish in (*WISHES, *(ON_CUDA if args.device != "cpu" else ()))
            ]
            chosen = [wish for wish in wishes if not args.only or wish.name in args.only]
            rows = []
            for wish in (None, *chosen):
                rows.append(bench.row(wish))
                print(f"{name} {rows[-1]['variant']}: {_said(rows[-1])}", file=sys.stderr)
            console.print(_table(name, rows))
            everything += rows
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1))
    return 0


def _said(row: Mapping[str, Any]) -> str:
    return str(row.get("reason") or row.get("benchmark", {}).get("reason") or "measured")


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=name, box=None)
    for column in (
        "variant",
        "size ×",
        "verdict",
        "kept",
        "bound",
        "p50 ms",
        "p99 ms",
        "× faster",
        "rows/s",
        "× rows",
        "MB",
    ):
        table.add_column(column, justify="left" if column in ("variant", "verdict") else "right", no_wrap=True)
    for row in rows:
        seen, metrics = row.get("benchmark", {}), row.get("metrics", {})
        table.add_row(
            row["variant"],
            _number(row.get("ratio"), 2),
            str(row.get("verdict") or row.get("built") or "original"),
            _number(metrics.get("kept"), 4),
            _number(metrics.get("kept_bound"), 4),
            _number(seen.get("p50"), 3, 1e3),
            _number(seen.get("p99"), 3, 1e3),
            "same" if seen.get("finding") == "same" else _number(seen.get("speedup"), 2),
            _number(seen.get("throughput"), 0),
            _number(seen.get("throughput_ratio"), 2),
            _number(seen.get("memory"), 0, 1e-6) if seen.get("status") == "valid" else str(seen.get("status", "")),
        )
    return table


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
