"""The wire types of the REST API, for clients and hosts. No SQLModel here: it would cost every client 345 ms.

Times are ISO 8601 in UTC. A test compares the fields with the tables'.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from weighbridge import limits
from weighbridge.storage.names import composed

T = TypeVar("T")
ModelName = Annotated[limits.ModelName, AfterValidator(composed)]
"""In whichever spelling it is sent: in the registry it has one."""


class Wire(BaseModel):
    """Unknown fields are ignored, so that an older client can talk to a newer registry."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Sent(Wire):
    """What a caller sends: no infinities, and every text within `weighbridge.limits`. (Answers are not checked: they
    may come from an older registry's rows.)"""

    model_config = ConfigDict(allow_inf_nan=False)


class Page(Wire, Generic[T]):
    """One page of a listing. `next` is the opaque cursor of the following page, None at the end."""

    items: list[T]
    next: str | None = None


class Problem(Wire):
    """RFC 9457 problem details: every error of the API."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    code: str
    data: dict[str, Any] = {}
    """The error's own fields: `what` and `name` of a `not-found`, `expected` and `found` of a `revision-mismatch`."""


class Model(Wire):
    name: str
    description: str = ""
    latest: int | None = None
    """The highest version number, None before the first."""
    aliases: dict[str, int] = {}
    tags: dict[str, str] = {}
    revision: int
    created_at: datetime


class Metric(Wire):
    name: str
    value: float
    unit: str = ""
    slice: str = ""
    dataset_digest: str = ""


class GateResult(Wire):
    gate: str
    verdict: str
    observed: float | None = None
    limit: float | None = None
    reason: str = ""


class File(Wire):
    """A file of a checkpoint as pinned; `digest` is filled by validation."""

    key: str
    size: int
    etag: str
    digest: str | None = None


class Job(Wire):
    id: int
    key: str
    stage: str
    part: str = ""
    queue: str
    state: str
    attempt: int
    max_attempts: int
    progress: float
    verdict: str | None = None
    reason: str = ""
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class BenchmarkRow(Wire):
    """One scenario of one mode. Times are seconds, throughput rows a second, memory bytes.

    `single_stream`: one request after the other, `batch` rows each. `server`: Poisson arrivals at `rate` requests a
    second, latency from the scheduled time. `offline`: as many rows as fit a second. `closed`: `concurrency` callers.
    """

    scenario: Literal["single_stream", "server", "offline", "closed"]
    mode: Literal["eager", "compiled", "cuda_graph", "onnxruntime"]
    batch: int = Field(default=1, le=limits.COUNT)
    concurrency: int = Field(default=1, le=limits.COUNT)
    rate: float | None = None
    count: int = Field(le=limits.COUNT)
    """Requests measured."""
    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    throughput: float
    ratio: float | None = None
    """The original's p50 over this one's, the median of paired ratios; offline: this throughput over the original's."""
    low: float | None = None
    high: float | None = None
    """The interval of the ratio, with what the original differs from itself by; 1 in it: no difference is shown."""
    clock: Literal["wall", "cpu", "both", ""] = ""
    """What the ratio is of: time on the wall; beside other work time of a processor, or what both allow."""
    finding: Literal["faster", "slower", "same", ""] = ""
    contended: limits.Prose = ""
    """What else took the machine meanwhile; then nothing but the ratio counts."""
    histogram: dict[limits.Id, limits.Count] = Field(default={}, max_length=limits.ENTRIES)
    """Latencies by upper bound in seconds, as text."""


class Benchmark(Wire):
    """A variant measured on one kind of device beside the original; what models.Benchmark says of the fields."""

    artifact_digest: limits.Id
    kind: limits.Id
    hardware: dict[str, Any] = {}
    status: Literal["valid", "invalid_noisy"]
    reason: limits.Prose = ""
    p50: float | None = None
    p99: float | None = None
    throughput: float | None = None
    memory: int | None = Field(default=None, le=limits.BYTES)
    energy: float | None = None
    load_seconds: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    throughput_ratio: float | None = None
    throughput_low: float | None = None
    throughput_high: float | None = None
    spread: float | None = None
    finding: Literal["faster", "slower", "same", ""] = ""
    contended: limits.Prose = ""
    rows: list[BenchmarkRow] = Field(default=[], max_length=limits.ENTRIES)
    environment: dict[str, Any] = {}
    source: limits.Name = ""
    measured_at: datetime | None = None
    """None: now."""


class VariantBenchmark(Benchmark):
    """A measurement with the name of its variant."""

    variant: str


class VariantTensor(Wire):
    """What became of one tensor. `sqnr` in dB; None: exact, or not comparable. Sizes in bytes."""

    name: str
    action: str
    reason: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    sqnr: float | None = None


class Choice(Wire):
    """Which variant hosts of one kind get of a version, and why. `front` names the Pareto front."""

    kind: str
    label: str = ""
    """The hardware in words; empty where nobody of that kind was seen."""
    variant: str
    artifact: str
    reason: str
    front: list[str] = []
    measured: bool = False


class Worker(Wire):
    """A worker as it last said what it can do."""

    owner: str
    machine: str
    queues: list[str]
    kind: str
    hardware: dict[str, Any] = {}
    seen_at: datetime


class Variant(Wire):
    name: str
    status: str
    reason: str = ""
    artifact_digest: str | None = None
    wish: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    size: int = 0
    metrics: list[Metric] = []
    gates: list[GateResult] = []
    jobs: list[Job] = []


class Version(Wire):
    model: str
    number: int
    status: str
    reason: str = ""
    path: str = ""
    proof: str = ""
    unproven: bool = False
    source_digest: str | None = None
    weights: str | None = None
    """Digest of what its weight files hold: its identity. None until it was judged, and for a duplicate."""
    duplicate_of: int | None = None
    """The number of the version that has the same weights."""
    size: int = 0
    aliases: list[str] = []
    tags: dict[str, str] = {}
    evidence: dict[str, Any] = {}
    revision: int
    created_at: datetime
    written_at: datetime | None = None
    """When its weights were written: the order of versions. (None: a registry that does not say.)"""
    ready_at: datetime | None = None


class VersionDetail(Version):
    """One version whole: what it is made of, what was proven and measured, what runs."""

    proof_reason: str = ""
    recipe: dict[str, Any] | None = None
    """The effective recipe that judges it."""
    recipe_ignored: list[str] = []
    facts: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    """What its publisher said of it (`publish(metadata=…)`, `push --metadata`)."""
    file_metadata: dict[str, str] = {}
    """What its weight files say of themselves (safetensors' `__metadata__`)."""
    files: list[File] = []
    variants: list[Variant] = []
    variants_settled: bool = True
    """Nothing more is to come of its variants: every one is built, judged and measured, or cannot be."""
    jobs: list[Job] = []


class Alias(Wire):
    """A movable name of a version; `revision` is what If-Match demands."""

    name: str
    number: int
    revision: int


class AliasTarget(Sent):
    """What an alias shall point at."""

    version: limits.Count


class TagValue(Sent):
    value: limits.TagText = ""


class Checkpoint(Wire):
    """A path in the bucket that is not (only) a version: what waits, or was refused, and why."""

    model: str
    path: str
    state: str
    proof: str = ""
    reason: str = ""
    needs_person: bool = False
    """Nothing that is still being written will change this: somebody has to."""
    created_at: datetime
    updated_at: datetime


class Template(Wire):
    name: str
    digest: str
    fingerprint: str
    parameters: dict[str, Any]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    created_at: datetime


class Event(Wire):
    seq: int
    kind: str
    model: str | None = None
    version: int | None = None
    subject: str = ""
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    actor: str = ""
    reason: str = ""
    created_at: datetime


# --- the host protocol (docs/host-protocol.md)


class Enrolment(Sent):
    """What a host says of itself. `id` is persisted by the host; empty at the very first start."""

    id: limits.Id = ""
    name: limits.Name
    url: limits.Path = ""
    """Base URL where it serves the inference protocol."""
    labels: limits.Labels = {}
    device: dict[str, Any] = {}


class Enrolled(Wire):
    """The host's id, the epoch that fences its older processes, its host-scoped token (None on an open registry)."""

    id: str
    epoch: int
    token: str | None = None


class Slot(Sent):
    """One thing a host should hold: a version's variant, what it is for, and its share of the live traffic."""

    version: limits.Count
    variant: limits.Id
    artifact: limits.Id
    role: Literal["live", "standby"] = "live"
    weight: float = 1.0
    mirror: bool = False


class DesiredModel(Wire):
    """`generation` grows with every change of the slots; a host reports which one it holds."""

    model: str
    generation: int
    slots: list[Slot]


class Desired(Wire):
    """A host's whole desired state at `revision`; a model that is not listed is to be unloaded."""

    revision: int
    models: list[DesiredModel]


class Interval(Sent):
    """What a slot served between two reports; `id` grows within an epoch and deduplicates repeated reports."""

    id: str = Field(max_length=limits.INTERVAL)
    seconds: limits.Seconds
    requests: limits.Count = 0
    """Those that say something about the version: not what is malformed, or never reached it."""
    errors: limits.Count = 0
    """The version's own failures: its golden fails too, or it hangs."""
    input_errors: limits.Count = 0
    """Failures that may lie in what was asked: inside the program while the golden holds, or not in time."""
    refused: limits.Count = 0
    """Refusals by the version's contract: names, shapes, values, memory."""
    latency: dict[limits.Id, limits.Count] = Field(default={}, max_length=limits.ENTRIES)
    """Counts by upper bound in seconds, as text; `+Inf` last."""


class ObservedSlot(Sent):
    version: limits.Count
    variant: limits.Id
    artifact: limits.Id
    state: Literal["pending", "pulling", "loading", "live", "standby", "draining", "failed"]
    reason: limits.Prose = ""
    golden: Literal["unchecked", "passed", "failed"] = "unchecked"
    interval: Interval | None = None


class ObservedModel(Sent):
    model: ModelName
    generation: limits.Count
    """The generation these slots are of."""
    slots: list[ObservedSlot] = Field(max_length=limits.ENTRIES)


class Observed(Sent):
    """What a host holds. `epoch` fences: a report of an older process is refused with `stale-epoch`."""

    epoch: limits.Count
    models: list[ObservedModel] = Field(max_length=limits.ENTRIES)
    memory: dict[limits.Id, float] = Field(default={}, max_length=limits.ENTRIES)


class AssignmentView(Wire):
    """One model on one host, wanted and seen."""

    model: str
    generation: int
    slots: list[Slot]
    observed: ObservedModel | None = None
    requests: int = 0
    errors: int = 0
    input_errors: int = 0
    refused: int = 0
    live_at: datetime | None = None


class Host(Wire):
    id: str
    name: str
    url: str = ""
    labels: dict[str, str] = {}
    device: dict[str, Any] = {}
    epoch: int
    state: str
    silent_seconds: float | None = None
    """Since its last call, by the database's clock; None: it never called."""
    silent: bool = False
    """Nothing was heard of it for `registry.silent_seconds`: what it said that it serves is what it said then."""
    assignments: list[AssignmentView] = []
    created_at: datetime


# --- rollouts


class RolloutStep(Wire):
    number: int
    action: str
    detail: dict[str, Any] = {}
    observations: dict[str, Any] = {}
    actor: str = ""
    created_at: datetime


class Rollout(Wire):
    id: int
    model: str
    fleet: dict[str, str] = {}
    number: int
    variants: dict[str, str] = {}
    """The variant that each kind of host gets; the key "" is for every other kind."""
    from_number: int | None = None
    from_variants: dict[str, str] = {}
    status: str
    reason: str = ""
    wave: int
    waves: list[int | str] = []
    actor: str = ""
    settings: dict[str, Any] = {}
    steps: list[RolloutStep] = []
    revision: int
    created_at: datetime
    finished_at: datetime | None = None


class RolloutStart(Sent):
    """Start a rollout by hand. `version`: a number, an alias or `latest`; without it the newest ready one. `settings`
    override the recipe's rollout part, within the operator's policy."""

    model: ModelName
    version: limits.Count | limits.Name | None = None
    variant: limits.Id | None = None
    """For every kind of host; None: each kind gets what is measured to be best for it."""
    settings: dict[str, Any] = {}
    reason: limits.Prose = ""


class Decision(Sent):
    """A person's `pause`, `resume`, `abort`, `promote` (skip the rest of the bake) or `approve`, with the reason."""

    reason: limits.Prose = ""
    actor: limits.Actor = ""
    """What older clients send; the token's name counts."""
    force: bool = False
    """Also where a fleet would be left with nothing to serve (`leaves-nothing`)."""


class Loss(Wire):
    """What archiving a version would take from whom. Hosts by their names."""

    hosts: list[str] = []
    """Those that hold it."""
    aliases: list[str] = []
    """Those that name it."""
    bare: list[str] = []
    """Those of the hosts that would be left with nothing of its model."""
    champion: int | None = None
    """The champion afterwards; None: there would be none."""
    leaves_nothing: bool = False
    """The registry refuses it unless it is forced."""


class StoreAddress(Wire):
    """Where checkpoints are dropped: `url` (a folder's absolute path, or s3://BUCKET), the keys' `prefix`, endpoint."""

    url: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    path_style: bool = True


# --- tokens


class TokenWish(Sent):
    """A token to create. `ttl` in seconds, None: until it is revoked. `host_id` binds a host's or enrol token."""

    role: str = Field(max_length=limits.SHORT)
    name: limits.Name = ""
    ttl: limits.Seconds | None = None
    host_id: limits.Id | None = None


class NewToken(Wire):
    """The only time that a token is shown."""

    token: str


class Token(Wire):
    id: int
    role: str
    name: str
    host_id: str | None = None
    created_at: datetime
    expires_at: datetime | None = None
    used_at: datetime | None = None
    revoked_at: datetime | None = None


class SilentHost(Wire):
    """A host that says nothing; `seconds` None: it never did."""

    id: str
    name: str
    seconds: float | None = None


class StoreAway(Wire):
    """A store that the daemon cannot reach, and why."""

    store: str
    reason: str
    since: datetime


class SetAside(Wire):
    """A version whose job was set aside: nothing is known of it, and `rejudge` begins anew."""

    model: str
    number: int
    path: str
    reason: str


class Status(Wire):
    """What goes on and what waits: the whole of `weighbridge status`."""

    version: str
    models: int
    versions: dict[str, int]
    """By status."""
    jobs: dict[str, int]
    """By state."""
    waiting: list[Checkpoint]
    """Checkpoints that wait or were refused, newest first (up to 100)."""
    open_checkpoints: int = 0
    """How many wait or were refused; `GET /v1/checkpoints` has them in pages."""
    set_aside: list[SetAside] = []
    """Newest first (up to 100)."""
    rollouts: list[Rollout]
    hosts: int
    silent: list[SilentHost] = []
    """Those of the hosts that say nothing."""
    away: list[StoreAway] = []
    """The watched stores that cannot be reached."""
    daemon_silent_seconds: float | None = None
    """Since a daemon should have given a sign of life; 0 while one is there, None: none ever was."""
    last_seq: int
