"""Settings of the workers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class WorkerSettings(BaseModel):
    """What one `weighbridge worker` process takes on, and for how long."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    queues: tuple[Literal["cpu", "variants", "gpu", "control"], ...] = Field(
        default=("cpu", "variants", "control"),
        min_length=1,
        description="Queues to take jobs from: cpu (weigh checkpoints), variants (compress, compare, benchmark), "
        "gpu (variants that need CUDA), control (rollout steps).",
    )
    concurrency: int = Field(default=2, ge=1, description="Jobs of cpu at once in this process.")
    variant_jobs: int = Field(default=1, ge=1, description="Jobs of variants and of gpu at once, each.")
    threads: int = Field(default=1, ge=1, description="Torch threads a job.")
    device: str = Field(default="cpu", description="Device to run programs and benchmarks on: cpu, cuda, cuda:1.")
    niceness: int = Field(
        default=10,
        ge=0,
        le=19,
        description="Niceness at which variants are built and compared, so that what serves beside them comes first; "
        "beside other busy programs they get about a tenth of a processor. 0 where nobody is served.",
    )
    benchmark_seconds: float = Field(
        default=4.0, gt=0, description="Time that one benchmark measures for on a free machine, beside loading (s)."
    )
    benchmark_limit: float = Field(
        default=120.0,
        gt=0,
        description="Time after which a benchmark ends on any machine, with loading and giving way to other jobs (s).",
    )
    machine: Path | None = Field(
        default=None,
        description="Folder of the locks that keep benchmarks alone on this machine; every worker of the machine "
        "needs the same, and nobody else may write to it. Empty: one of this user's own in XDG_RUNTIME_DIR, or in the "
        "data folder where there is none.",
    )
    lease_seconds: float = Field(
        default=30.0, gt=0, description="A job silent for this long is given to another worker (s)."
    )
    retry_seconds: float = Field(
        default=5.0, ge=0, description="Pause before the second attempt, doubled each time (s)."
    )
    stage_timeout: float = Field(default=3600.0, gt=0, description="Hard limit of one job (s).")
    parse_seconds: float = Field(
        default=20.0,
        gt=0,
        description="Processor time for parsing what strangers wrote of one checkpoint (headers, index, "
        "configuration); one that needs more is quarantined (s).",
    )
    parse_bytes: int = Field(
        default=224 << 20,  # an idle one has 270 MB: half a gigabyte in all
        ge=32 << 20,
        description="Memory for the same, beyond an idle process's; a checkpoint that needs more is quarantined "
        "(bytes).",
    )
    memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Memory that one job's process may take; one that needs more is ended and tried again. 0: nine "
        "tenths of the machine's (bytes).",
    )
    shutdown_seconds: float = Field(
        default=60.0, ge=0, description="Time that running jobs get at a soft shutdown (s)."
    )
    reserve_bytes: int = Field(
        default=1_000_000_000,
        ge=0,
        description="What stays free on the disk of the artifacts: a checkpoint that would leave less is not copied, "
        "and waits (bytes).",
    )
    cache: Path = Field(default=Path("worker-cache"), description="Folder of verified blobs.")
    cache_bytes: int = Field(
        default=20_000_000_000, ge=0, description="Size above which old blobs leave the cache (bytes)."
    )
