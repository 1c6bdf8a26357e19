"""The stage *benchmark*: how fast an artifact is on this machine, beside the original. No Celery, no SQL.

Each runs in a fresh process, the original in two: what differs between those is no difference. It ends within `limit`
seconds with what this machine allows: beside other work the ratio to the original is a fact, with a wider interval, and
absolute figures are marked. Without a ratio the verdict is *noisy*. The original against itself is the A/A run.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from weighbridge import terminal
from weighbridge.engines import hardware
from weighbridge.engines.blobs import read_manifest
from weighbridge.engines.errors import LoadError
from weighbridge.engines.hardware import Hardware, NoSuchDevice
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import BlobPath
from weighbridge.registry.lifecycle import Verdict
from weighbridge.registry.schemas import Benchmark
from weighbridge.workers.benchmarking import contention, report
from weighbridge.workers.benchmarking.children import Child, ChildFailed
from weighbridge.workers.benchmarking.contention import Watch
from weighbridge.workers.benchmarking.gpu import Gpu
from weighbridge.workers.benchmarking.judgement import Judged
from weighbridge.workers.benchmarking.machine import Alone, Machine
from weighbridge.workers.benchmarking.measure import (
    AGAIN,
    CANDIDATE,
    ORIGINAL,
    Depth,
    Measurement,
    Mode,
    Result,
    Wish,
)
from weighbridge.workers.benchmarking.rounds import FEWEST, Course, OutOfTime
from weighbridge.workers.outcome import Outcome

_ENCODINGS = {"torchao": "torchao"}
"""What an encoding needs installed besides the engine."""


@dataclass(frozen=True)
class BenchmarkTask:
    """One variant on one device. BLAKE3 digests: of the two manifests, and of an eval.safetensors to take inputs of.

    `artifact` equal to `original` is the A/A run, and the original's own measurement.
    """

    artifact: str
    original: str
    device: str = "cpu"
    threads: int = 1
    factories: tuple[str, ...] = ()
    dataset: str | None = None
    """None: synthetic inputs."""
    modes: tuple[Mode, ...] = ()
    """On top of the one that a host serves in (eager, or onnxruntime). Compiling takes from seconds to minutes."""
    depth: Depth = "quick"
    seconds: float = 3.0
    """To measure for on a free machine, beside starting and loading; modes come on top, and slow programs and wide
    intervals take more, up to `limit`."""
    limit: float = 120.0
    """Seconds after which it ends, with everything: waiting for the machine, starting, loading, giving way."""
    slo: float | None = None
    """Seconds that p99 of the server scenario must keep; None: measure.SLO_FACTOR times the original's p99."""


@dataclass
class _Job:
    """What the parts of one call share."""

    task: BenchmarkTask
    kind: Hardware
    cache: BlobPath
    watch: Watch
    gpu: Gpu | None
    progress: Callable[[float], None]
    started: float = field(default_factory=time.monotonic)
    doing: str = "waiting for ordinary jobs of this machine to end"
    done: float = 0.0
    cold: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the bound."""
        return self.started + self.task.limit - time.monotonic()

    def beat(self) -> None:
        """Say that it goes on. Raises OutOfTime, and what the caller's progress raises, which ends the stage."""
        self.progress(self.done)
        if self.left <= 0:
            raise OutOfTime


def benchmark(
    task: BenchmarkTask,
    *,
    cache: BlobPath,
    progress: Callable[[float], None] | None = None,
    machine: Machine | None = None,
    watch: Watch | None = None,
) -> Outcome:
    """Measure; passed and noisy carry `benchmark`, a schemas.Benchmark as JSON, in their facts.

    `progress` is called with the share done, 0 to 1, at least every second, also while the machine is waited for.
    `machine` is held alone while anything is measured; None: it is ours already. Raises only what `cache` and
    `progress` raise.
    """
    try:
        kind = hardware.describe(task.device)
        gpu = Gpu(task.device) if kind.device == "cuda" else None
    except NoSuchDevice as missing:
        return Outcome.not_applicable(str(missing))
    job = _Job(task, kind, cache, watch or Watch(), gpu, progress or (lambda _: None))
    try:
        if missing_engine := _missing(job):
            return Outcome.not_applicable(missing_engine)
        with ExitStack() as held:
            lease = held.enter_context(machine.alone(job.beat)) if machine is not None else None
            return _measure(job, lease)
    except ChildFailed as failed:
        return _failed(failed)
    except LoadError as wrong:
        return Outcome.rejected(f"the artifact does not run: {wrong}")
    except OutOfTime:
        return _unmeasured(job, f"the {task.limit:g} s of a benchmark were over while {job.doing}")
    finally:
        if gpu is not None:
            gpu.close()


def _failed(failed: ChildFailed) -> Outcome:
    if failed.kind == "input":
        return Outcome.not_applicable(f"there is nothing to measure with: {failed}")
    return Outcome.rejected(f"the artifact does not run: {failed}")


def _missing(job: _Job) -> str:
    """What an artifact needs and this machine has not; empty where nothing is missing."""
    for digest in (job.task.original, job.task.artifact):
        manifest = _manifest(job, digest)
        needed = [_engine(manifest)]
        if manifest.encoding is not None and manifest.encoding.kind in _ENCODINGS:
            needed.append(_ENCODINGS[manifest.encoding.kind])
        for name in needed:
            if name not in job.kind.engines:
                return f"the variant {manifest.variant} needs {name}, which is not installed here"
    return ""


def _measure(job: _Job, lease: Alone | None) -> Outcome:
    with ExitStack() as running:
        job.doing = "starting and loading the programs"
        children = _start(job, running)
        course = Course(children, job.watch, lease, job.gpu, job.beat)
        result = Measurement(course, _wish(job), job.gpu).run()
        if result.latency is None:
            took, rounds = contention.taken(course.readings, course.limits), result.details.get("rounds", 0)
            beside = f", beside other work: {took}" if took else ""
            job.doing = f"{rounds} of at least {FEWEST} rounds were measured{beside}"
            raise OutOfTime
        row = _row(job, course, result, result.latency)
        job.progress(1.0)
        return Outcome.passed(_said(row), {"benchmark": row.model_dump(mode="json")})


def _unmeasured(job: _Job, reason: str) -> Outcome:
    """Nothing is known but that, and why."""
    row = Benchmark(
        artifact_digest=job.task.artifact,
        kind=job.kind.kind,
        hardware=job.kind.model_dump(),
        status="invalid_noisy",
        reason=reason,
        environment={"seconds": round(time.monotonic() - job.started, 3), "limit": job.task.limit},
        source=socket.gethostname(),
        measured_at=datetime.now(UTC),
    )
    return Outcome(Verdict.NOISY, reason, {"benchmark": row.model_dump(mode="json")})


def _start(job: _Job, running: ExitStack) -> dict[str, Child]:
    """The processes, warm and loaded. They import side by side, which costs seconds each, and load one by one."""
    digests = {ORIGINAL: job.task.original, AGAIN: job.task.original}
    if job.task.artifact != job.task.original:
        digests[CANDIDATE] = job.task.artifact
    threads, device = job.task.threads, job.task.device
    children = {name: running.enter_context(Child(threads, job.beat)) for name in digests}
    for name, child in children.items():
        child.send("start", engine=_engine(_manifest(job, digests[name])), device=device, threads=threads)
    for child in children.values():
        child.answer()
    for number, (name, child) in enumerate(children.items(), start=1):
        job.cold[name] = child.ask("load", **_order(job, digests[name]))
        job.done = 0.3 + 0.1 * number / len(children)
        job.beat()
    return children


def _order(job: _Job, digest: str) -> dict[str, Any]:
    manifest, task = _manifest(job, digest), job.task
    needed = [digest, *(blob for blob in manifest.blobs() if blob != manifest.golden.digest)]
    return {
        "artifact": digest,
        "blobs": {blob: str(job.cache(blob)) for blob in needed},
        "factories": list(task.factories),
        "threads": task.threads,
        "dataset": None if task.dataset is None else str(job.cache(task.dataset)),
    }


def _manifest(job: _Job, digest: str) -> Manifest:
    return read_manifest(job.cache, digest)


def _engine(manifest: Manifest) -> str:
    return manifest.engine.get("name", "torch")


def _wish(job: _Job) -> Wish:
    cold = job.cold[_candidate(job)]
    serving: Mode = "onnxruntime" if _engine(_manifest(job, job.task.artifact)) == "onnxruntime" else "eager"
    return Wish(
        serving=serving,
        modes=[mode for mode in job.task.modes if mode != serving],
        depth=job.task.depth,
        seconds=job.task.seconds,
        most=max(0.0, job.left),
        threads=job.task.threads,
        slo=job.task.slo,
        fixed=cold["fixed"],
        memory=job.kind.memory_bytes,
    )


def _candidate(job: _Job) -> str:
    return CANDIDATE if CANDIDATE in job.cold else AGAIN


def _row(job: _Job, course: Course, result: Result, latency: Judged) -> Benchmark:
    """The measurement as the registry records it."""
    single = next(row for row in result.rows if row.scenario == "single_stream")
    headline = [row for row in result.rows if row.mode == single.mode and row.scenario in ("single_stream", "offline")]
    cold, throughput = job.cold[_candidate(job)], result.throughput
    return Benchmark(
        artifact_digest=job.task.artifact,
        kind=job.kind.kind,
        hardware=job.kind.model_dump(),
        status="valid",
        p50=single.p50,
        p99=single.p99,
        throughput=result.best,
        memory=_memory(job, course, result),
        energy=result.energy,
        load_seconds=cold["load"] + cold["first"],
        speedup=_shown(latency),
        speedup_low=latency.compared.low,
        speedup_high=latency.compared.high,
        throughput_ratio=throughput and _shown(throughput),
        throughput_low=throughput and throughput.compared.low,
        throughput_high=throughput and throughput.compared.high,
        spread=latency.spread,
        finding=latency.finding,
        contended=next((row.contended for row in headline if row.contended), ""),
        rows=result.rows,
        environment=_environment(job, course, result, latency),
        source=socket.gethostname(),
        measured_at=datetime.now(UTC),
    )


def _shown(judged: Judged) -> float:
    """1.0 for what the interval does not show."""
    return 1.0 if judged.finding == "same" else judged.compared.ratio


def _memory(job: _Job, course: Course, result: Result) -> int:
    """Peak bytes: on a GPU what torch's allocator took there, or the whole process as NVML sees it; else resident."""
    said = result.details["memory"]
    if job.gpu is not None:
        said["process"] = job.gpu.memory(course.children[_candidate(job)].pid)
    return int(said.get("reserved") or said.get("process") or said["peak"])


def _environment(job: _Job, course: Course, result: Result, latency: Judged) -> dict[str, Any]:
    distributions = ("torch", "torchao", "onnxruntime", "numpy", "weighbridge")
    versions = {name: metadata.version(name) for name in distributions if _installed(name)}
    return {
        "versions": versions | {"python": platform.python_version(), "kernel": platform.release()},
        "threads": job.task.threads,
        "depth": job.task.depth,
        "inputs": job.cold[_candidate(job)]["inputs"],
        "cold": {name: {part: cold[part] for part in ("load", "first")} for name, cold in job.cold.items()},
        "processor_mhz": _clocks(),
        "latency": asdict(latency),
        "throughput": result.throughput and asdict(result.throughput),
        "contention": contention.worst(course.readings),
        "gave_way": course.gave_way,
        "limit": job.task.limit,
        "seconds": round(time.monotonic() - job.started, 3),
        "notes": result.notes,
        **result.details,
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _clocks() -> list[float]:
    """What the processors say that they run at, now."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]


def _said(row: Benchmark) -> str:
    interval = f"{row.speedup_low:.2f}–{row.speedup_high:.2f}"
    if row.finding == "same":
        ratio = f"no difference from the original is shown ({interval} × its speed)"
    else:
        ratio = f"{row.speedup:.2f} × the original's speed ({interval})"
    if row.contended:
        return f"{ratio}, measured beside other work: {row.contended}"
    return f"{ratio}; p50 {row.p50:.3g} s, p99 {row.p99:.3g} s, {row.throughput:,.0f} rows a second"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure an artifact of local blobs: `python -m weighbridge.workers.benchmark ARTIFACT --blobs FOLDER`.

    Ends with 0 when it was measured, 3 when its time was over before, 1 when it cannot be measured.
    """
    from weighbridge.storage.in_place import InPlace

    args = _arguments(argv)
    kept = InPlace.of(args.blobs)
    task = BenchmarkTask(
        artifact=args.artifact,
        original=args.against or args.artifact,
        device=args.device,
        threads=args.threads,
        factories=tuple(args.factories),
        dataset=args.dataset,
        modes=tuple(args.modes),
        depth="full" if args.full else "quick",
        seconds=args.seconds,
        slo=args.slo,
        limit=args.limit,
    )
    outcome = benchmark(task, cache=kept.path, machine=Machine(args.machine))
    rows = [Benchmark.model_validate(outcome.facts["benchmark"])] if "benchmark" in outcome.facts else []
    report.show(rows)
    print(f"{outcome.verdict}: {outcome.reason}", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps([row.model_dump(mode="json") for row in rows], indent=1) + "\n")
    return {Verdict.PASSED: 0, Verdict.NOISY: 3}.get(outcome.verdict, 1)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = terminal.Arguments(prog="weighbridge.workers.benchmark", description=main.__doc__)
    parser.add_argument("artifact", help="digest of the manifest")
    parser.add_argument("--against", metavar="ORIGINAL", help="digest of the original's manifest; else against itself")
    parser.add_argument("--blobs", type=Path, required=True, help="the folder that holds blobs/")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine, on a CPU")
    parser.add_argument("--factories", nargs="*", default=[], help="patterns of allowed package.module:factory")
    parser.add_argument("--dataset", help="digest of an eval.safetensors whose inputs are used")
    parser.add_argument("--modes", nargs="*", default=[], choices=get_args(Mode), help="besides the one hosts serve in")
    parser.add_argument("--seconds", type=float, default=BenchmarkTask.seconds, help="to measure for, beside loading")
    parser.add_argument("--full", action="store_true", help="sweep more batches, callers and rates")
    parser.add_argument("--slo", type=float, help="seconds that p99 must keep in the server scenario")
    parser.add_argument(
        "--limit", type=float, default=BenchmarkTask.limit, help="seconds until it ends, with everything"
    )
    parser.add_argument("--machine", type=Path, help="folder of the machine's lease, shared with its workers")
    parser.add_argument("--json", type=Path, help="write what `weighbridge benchmark import` reads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    terminal.run("weighbridge.workers.benchmark", main)
