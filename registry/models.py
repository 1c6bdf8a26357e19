"""The tables. Every fact Weighbridge knows is a row here; everything else is re-derived from them.

Times are seconds since the epoch by the database's own clock (`db.now()`), so that leases of several machines compare.
Digests are BLAKE3, hex. JSON columns hold values that are read and written whole.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    UniqueConstraint,
    false,
    text,
)
from sqlmodel import Field, SQLModel

from weighbridge import limits
from weighbridge.registry import columns
from weighbridge.registry.clock import now
from weighbridge.registry.lifecycle import ACTIVE_ROLLOUT

SQLModel.metadata.naming_convention = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "ix": "ix_%(column_0_label)s",
}
"""A later migration can change only what has a name."""

_BIG_ID = BigInteger().with_variant(Integer, "sqlite")
"""SQLite gives row ids only to INTEGER columns."""
_ACTIVE = text("status IN ({})".format(", ".join(f"'{status}'" for status in ACTIVE_ROLLOUT)))


def _time(*, nullable: bool = False) -> Any:
    """Not nullable: the database's time of the INSERT, unless it is given."""
    return Field(default=None, sa_column=Column(Double, nullable=nullable, default=None if nullable else now()))


def _json(default: type = dict) -> Any:
    return Field(default_factory=default, sa_column=Column(JSON, nullable=False))


def _named(most: int) -> Any:
    return columns.Named(most)


def _prose() -> Any:
    return Field(default="", sa_column=Column(columns.Prose, nullable=False))


def _bytes() -> Any:
    return Field(default=0, sa_column=Column(BigInteger, nullable=False))


def _counted() -> Any:
    """A count that rows of an older release begin at 0."""
    return Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))


def _flag() -> Any:
    """False for rows of an older release."""
    return Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))


class Model(SQLModel, table=True):
    """A named line of versions. `next_version` is taken by UPDATE … RETURNING: never MAX+1, never reused."""

    __tablename__ = "model"
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True, sa_type=_named(limits.MODEL))
    description: str = _prose()
    next_version: int = Field(default=1)
    revision: int = Field(default=1)
    created_at: float = _time()


class Recipe(SQLModel, table=True):
    """One revision of a model's `recipe.yaml`, as it was read, and what the operator's policy made of it."""

    __tablename__ = "recipe"
    __table_args__ = (UniqueConstraint("model_id", "digest"),)
    id: int | None = Field(default=None, primary_key=True)
    model_id: int = Field(foreign_key="model.id", index=True)
    digest: str = Field(sa_type=_named(limits.ID))
    """Of the text and of the policy that it was merged with: a new policy makes a new revision."""
    text: str | None = Field(default=None, sa_column=Column(columns.Exact(limits.RECIPE)))
    """None: there is no recipe; the policy alone judges."""
    effective: dict[str, Any] = _json()
    """The recipe after the policy (registry.recipe.Recipe): what judges the versions that pin this revision."""
    ignored: list[str] = _json(list)
    """What the recipe asked for and the policy does not allow, in words."""
    created_at: float = _time()


class Checkpoint(SQLModel, table=True):
    """A path in the watched bucket, as last seen; complete content becomes a version. Says what waits and why."""

    __tablename__ = "checkpoint"
    __table_args__ = (UniqueConstraint("model", "path"),)
    id: int | None = Field(default=None, primary_key=True)
    model: str = Field(sa_type=_named(limits.MODEL), index=True)
    """The model's name; the model row itself is made with its first version."""
    path: str = Field(sa_type=_named(limits.PATH))
    state: str = Field(sa_type=_named(limits.SHORT), index=True)
    proof: str = Field(default="", sa_type=_named(limits.SHORT))
    reason: str = _prose()
    seen: str = Field(default="", sa_type=_named(limits.ID))
    """Digest of the listing (keys, etags, sizes) that led to this state: the same listing is not looked at again."""
    needs_person: bool = _flag()
    """Nothing that is being written will change its state: somebody has to."""
    revision: int = Field(default=1)
    created_at: float = _time()
    updated_at: float = _time()


class Version(SQLModel, table=True):
    """One registered checkpoint of a model; immutable but for status and pins. Its weights are no other version's."""

    __tablename__ = "version"
    __table_args__ = (
        UniqueConstraint("model_id", "number"),
        UniqueConstraint("model_id", "pins_digest"),
        UniqueConstraint("model_id", "idempotency_key"),
        Index("ix_version_model_newest", "model_id", "id"),
        Index("ix_version_model_written", "model_id", "written_at"),
        Index("uq_version_model_id_weights", "model_id", "weights", unique=True),
    )
    id: int | None = Field(default=None, primary_key=True)
    model_id: int = Field(foreign_key="model.id")
    number: int
    checkpoint_id: int | None = Field(default=None, foreign_key="checkpoint.id", index=True)
    path: str = Field(default="", sa_type=_named(limits.PATH))
    status: str = Field(default="discovered", sa_type=_named(limits.SHORT), index=True)
    reason: str = _prose()
    pins_digest: str = Field(sa_type=_named(limits.ID))
    """Of the pins that it was recorded with."""
    idempotency_key: str | None = Field(default=None, sa_type=_named(limits.NAME))
    proof: str = Field(default="", sa_type=_named(limits.SHORT))
    proof_reason: str = _prose()
    unproven: bool = Field(default=False)
    """Complete only by patience: barred from automatic rollout."""
    recipe_id: int | None = Field(default=None, foreign_key="recipe.id")
    eval_pin: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    """The evaluation set at record time (storage.Ref as a dict), or None."""
    train_pin: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    """The training set (`train.safetensors`) at record time: for calibration and recovery; or None."""
    source_digest: str | None = Field(default=None, sa_type=_named(limits.ID))
    """BLAKE3 of the canonical list of (path, size, digest); filled by validation."""
    weights: str | None = Field(default=None, sa_type=_named(limits.ID))
    """Digest of the content of its weight files (storage.identity), once it was judged: no other version has it. A
    duplicate has none; what was read of it is in its facts."""
    duplicate_of: int | None = Field(default=None)
    """The number of the version that has the same weights."""
    written_at: float = _time()
    """When its weights were written, by the store's clock: the order of versions, whenever they were found."""
    evidence: dict[str, Any] = _json()
    facts: dict[str, Any] = _json()
    judgement: int = Field(default=1)
    """Counts `rejudge`s: part of the job keys, so that a new judgement runs new jobs."""
    size: int = _bytes()
    revision: int = Field(default=1)
    created_at: float = _time()
    ready_at: float | None = _time(nullable=True)


class Said(SQLModel, table=True):
    """What is said of a version, by its publisher or by its files: nobody's word but theirs (registry.lineage)."""

    __tablename__ = "said"
    version_id: int = Field(primary_key=True, foreign_key="version.id")
    source: str = Field(primary_key=True, sa_type=_named(limits.SHORT))
    """`publisher` or `files`."""
    name: str = Field(primary_key=True, sa_type=_named(limits.NAME))
    value: str = Field(default="", sa_column=Column(columns.Exact(limits.METADATA_VALUE), nullable=False))


class CheckpointFile(SQLModel, table=True):
    """A file of a version, pinned: the content that was judged complete. `digest` is filled by validation."""

    __tablename__ = "checkpoint_file"
    __table_args__ = (UniqueConstraint("version_id", "key"),)
    id: int | None = Field(default=None, primary_key=True)
    version_id: int = Field(foreign_key="version.id", index=True)
    key: str = Field(sa_type=_named(limits.PATH))
    size: int = _bytes()
    etag: str = Field(sa_type=_named(limits.ETAG))
    object_version: str | None = Field(default=None, sa_type=_named(limits.ETAG))
    modified: str = Field(default="", sa_type=_named(40))
    digest: str | None = Field(default=None, sa_type=_named(limits.ID))


class Variant(SQLModel, table=True):
    """One servable form of a version; `original` is made by validation, the others by `compress`."""

    __tablename__ = "variant"
    __table_args__ = (UniqueConstraint("version_id", "name"),)
    id: int | None = Field(default=None, primary_key=True)
    version_id: int = Field(foreign_key="version.id", index=True)
    name: str = Field(sa_type=_named(limits.ID))
    status: str = Field(default="pending", sa_type=_named(limits.SHORT))
    reason: str = _prose()
    artifact_digest: str | None = Field(default=None, sa_type=_named(limits.ID), index=True)
    wish: dict[str, Any] = _json()
    """How to build it (registry.recipe.VariantWish); empty for the original."""
    facts: dict[str, Any] = _json()
    """What was found while building and judging it: {"ratio", "kept_layers", "notes", "calibration", "drift_on", …}."""
    size: int = _bytes()
    """Bytes of its weights (every file of the artifact but program, golden and manifest)."""
    created_at: float = _time()


class VariantTensor(SQLModel, table=True):
    """What became of one tensor of a variant: the report that makes a silent no-op impossible."""

    __tablename__ = "variant_tensor"
    __table_args__ = (UniqueConstraint("variant_id", "judgement", "name"),)
    id: int | None = Field(default=None, primary_key=True)
    variant_id: int = Field(foreign_key="variant.id")
    judgement: int = Field(default=1)
    name: str = Field(sa_type=_named(limits.TENSOR))
    action: str = Field(sa_type=_named(limits.ID))
    """`int8 per row`, `int4 groups of 32`, `pruned 90%`, `cast to bf16`, `kept` …"""
    reason: str = _prose()
    """Why it was kept; empty where it was changed as asked."""
    bytes_in: int = _bytes()
    bytes_out: int = _bytes()
    sqnr: float | None = _time(nullable=True)
    """Signal to quantization noise in dB; None: exact, or not comparable."""


class Benchmark(SQLModel, table=True):
    """One measurement of a variant on one kind of device, beside the original in the same run."""

    __tablename__ = "benchmark"
    __table_args__ = (Index("ix_benchmark_variant_kind", "variant_id", "kind"),)
    id: int | None = Field(default=None, primary_key=True)
    variant_id: int = Field(foreign_key="variant.id")
    artifact_digest: str = Field(sa_type=_named(limits.ID))
    """What was measured: a variant that was built anew needs a new measurement."""
    kind: str = Field(sa_type=_named(limits.ID))
    """Hardware fingerprint (engines.hardware.Hardware.kind)."""
    hardware: dict[str, Any] = _json()
    status: str = Field(sa_type=_named(limits.SHORT))
    """valid | invalid_noisy: the latter holds no comparison and is never a fact."""
    reason: str = _prose()
    p50: float | None = _time(nullable=True)
    """Seconds for one request of one row, SingleStream."""
    p99: float | None = _time(nullable=True)
    throughput: float | None = _time(nullable=True)
    """Rows a second, Offline."""
    memory: int | None = Field(default=None, sa_column=Column(BigInteger))
    """Peak bytes: of the device on a GPU, resident on a CPU."""
    energy: float | None = _time(nullable=True)
    """Joule per row above idle; None where nothing measures it."""
    load_seconds: float | None = _time(nullable=True)
    speedup: float | None = _time(nullable=True)
    """The original's p50 over this one's: the median of paired ratios. 1.0 and `same` for what the spread hides."""
    speedup_low: float | None = _time(nullable=True)
    speedup_high: float | None = _time(nullable=True)
    """The interval of `speedup` as it was measured, with the spread in it; None in rows of older versions."""
    throughput_ratio: float | None = _time(nullable=True)
    throughput_low: float | None = _time(nullable=True)
    throughput_high: float | None = _time(nullable=True)
    spread: float | None = _time(nullable=True)
    """What two runs of one program may differ by here, as a share: ratios within 1 ± spread are no difference."""
    finding: str = Field(default="", sa_type=_named(limits.SHORT))
    """faster | slower | same: the SingleStream latency against the original."""
    contended: str = _prose()
    """What else took the machine meanwhile; empty: nothing. Else only the ratios and the memory are facts."""
    rows: list[Any] = _json(list)
    """schemas.BenchmarkRow: every scenario, mode, batch and concurrency that was measured."""
    environment: dict[str, Any] = _json()
    """Versions, threads, contention, clocks."""
    source: str = Field(default="", sa_type=_named(limits.NAME))
    """The worker that measured it, or who imported it."""
    measured_at: float = _time()


class WorkerNode(SQLModel, table=True):
    """A worker as it last said what it can do: decides where jobs that need a device can go at all."""

    __tablename__ = "worker"
    owner: str = Field(primary_key=True, sa_type=_named(limits.NAME))
    machine: str = Field(default="", sa_type=_named(limits.NAME))
    queues: list[str] = _json(list)
    kind: str = Field(default="", sa_type=_named(limits.ID), index=True)
    hardware: dict[str, Any] = _json()
    seen_at: float = _time()


class Blob(SQLModel, table=True):
    """A blob that some artifact needs: hosts may fetch what is listed here for their assignments."""

    __tablename__ = "blob"
    digest: str = Field(primary_key=True, sa_type=_named(limits.ID))
    size: int = _bytes()
    created_at: float = _time()


class ArtifactBlob(SQLModel, table=True):
    """Which blobs an artifact is made of, itself included: decides what a host may fetch."""

    __tablename__ = "artifact_blob"
    artifact_digest: str = Field(primary_key=True, sa_type=_named(limits.ID))
    blob_digest: str = Field(primary_key=True, sa_type=_named(limits.ID), foreign_key="blob.digest", index=True)


class Template(SQLModel, table=True):
    """A program that an operator registered from trusted code: a `.pt2` without weights, by name or fingerprint."""

    __tablename__ = "template"
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True, sa_type=_named(limits.NAME))
    digest: str = Field(sa_type=_named(limits.ID))
    fingerprint: str = Field(sa_type=_named(limits.ID), index=True)
    parameters: dict[str, Any] = _json()
    inputs: list[Any] = _json(list)
    outputs: list[Any] = _json(list)
    created_at: float = _time()


class Metric(SQLModel, table=True):
    """One measured number of a variant; `slice` is empty for the whole, else e.g. `class=3`."""

    __tablename__ = "metric"
    __table_args__ = (Index("ix_metric_variant_name", "variant_id", "name"),)
    id: int | None = Field(default=None, primary_key=True)
    variant_id: int = Field(foreign_key="variant.id")
    name: str = Field(sa_type=_named(limits.ID))
    value: float = Field(sa_column=Column(Double, nullable=False))
    unit: str = Field(default="", sa_type=_named(limits.UNIT))
    slice: str = Field(default="", sa_type=_named(limits.ID))
    dataset_digest: str = Field(default="", sa_type=_named(limits.ID))
    judgement: int = Field(default=1)
    created_at: float = _time()


class GateResult(SQLModel, table=True):
    """A gate's verdict with the numbers that decided it."""

    __tablename__ = "gate_result"
    id: int | None = Field(default=None, primary_key=True)
    variant_id: int = Field(foreign_key="variant.id", index=True)
    gate: str = Field(sa_type=_named(128))
    verdict: str = Field(sa_type=_named(limits.SHORT))
    observed: float | None = _time(nullable=True)
    limit: float | None = _time(nullable=True)
    reason: str = _prose()
    judgement: int = Field(default=1)
    created_at: float = _time()


class Alias(SQLModel, table=True):
    """A movable name of a version. The composite foreign key keeps it from dangling."""

    __tablename__ = "alias"
    __table_args__ = (ForeignKeyConstraint(["model_id", "number"], ["version.model_id", "version.number"]),)
    model_id: int = Field(primary_key=True, foreign_key="model.id")
    name: str = Field(primary_key=True, sa_type=_named(limits.ALIAS))
    number: int
    revision: int = Field(default=1)
    updated_at: float = _time()


class Tag(SQLModel, table=True):
    """A key and a value on a model (`number` 0) or a version."""

    __tablename__ = "tag"
    model_id: int = Field(primary_key=True, foreign_key="model.id")
    number: int = Field(primary_key=True, default=0)
    key: str = Field(primary_key=True, sa_type=_named(limits.TAG_KEY))
    value: str = Field(default="", sa_column=Column(columns.Exact(limits.TAG_VALUE), nullable=False))


class Job(SQLModel, table=True):
    """One stage to run for one subject. `attempt` is the fence: only the attempt that holds it records an outcome."""

    __tablename__ = "job"
    __table_args__ = (
        Index("ix_job_open", "state", "not_before"),
        Index("ix_job_subject", "subject_type", "subject_id"),
    )
    id: int | None = Field(default=None, primary_key=True)
    key: str = Field(unique=True, sa_type=_named(limits.NAME))
    """`version:17:validate:1`, `rollout:4:step:3`: what makes a job once-only."""
    subject_type: str = Field(sa_type=_named(limits.SHORT))
    subject_id: int
    stage: str = Field(sa_type=_named(limits.UNIT))
    part: str = Field(default="", sa_type=_named(limits.ID))
    """Which part of the stage: a shard's number, or the kind of device to measure on."""
    queue: str = Field(sa_type=_named(96))
    needs: dict[str, Any] = _json()
    """What the worker must have: {"device": "cuda", "kind": …, "memory": bytes}."""
    state: str = Field(default="queued", sa_type=_named(limits.SHORT))
    attempt: int = Field(default=0)
    max_attempts: int = Field(default=3)
    deaths: int = Field(default=0, sa_column_kwargs={"server_default": "0"})
    """Workers, or confined children, that ended in the middle of it."""
    not_before: float = Field(default=0.0, sa_column=Column(Double, nullable=False))
    sent_at: float | None = _time(nullable=True)
    """When it was last handed to the broker; None: not yet, or not since it was queued again."""
    lease_owner: str | None = Field(default=None, sa_type=_named(limits.NAME))
    lease_until: float | None = _time(nullable=True)
    progress: float = Field(default=0.0)
    """0 to 1, for people to look at."""
    verdict: str | None = Field(default=None, sa_type=_named(limits.SHORT))
    reason: str = _prose()
    outcome: dict[str, Any] = _json()
    created_at: float = _time()
    started_at: float | None = _time(nullable=True)
    finished_at: float | None = _time(nullable=True)


class Event(SQLModel, table=True):
    """What changed, before and after, who caused it. `seq` is given after commit by the sequencer, without gaps."""

    __tablename__ = "event"
    __table_args__ = (
        Index(
            "ix_event_unsequenced",
            "id",
            sqlite_where=text("seq IS NULL"),
            postgresql_where=text("seq IS NULL"),
        ),
    )
    id: int | None = Field(default=None, sa_column=Column(_BIG_ID, primary_key=True))
    seq: int | None = Field(default=None, sa_column=Column(BigInteger, unique=True))
    kind: str = Field(sa_type=_named(limits.ID), index=True)
    """`version.recorded`, `version.ready`, `rollout.step`, `host.enrolled`, …: subject dot past tense."""
    model: str | None = Field(default=None, sa_type=_named(limits.MODEL), index=True)
    version: int | None = Field(default=None)
    subject: str = Field(default="", sa_type=_named(limits.SUBJECT))
    """`version:17`, `rollout:4`, `host:ab12`."""
    before: dict[str, Any] = _json()
    after: dict[str, Any] = _json()
    actor: str = Field(default="", sa_type=_named(limits.ACTOR))
    reason: str = _prose()
    created_at: float = _time()


class Host(SQLModel, table=True):
    """One inference server on one machine. A newer epoch fences an older process of the same host."""

    __tablename__ = "host"
    id: str = Field(primary_key=True, sa_type=_named(limits.ID))
    name: str = Field(default="", sa_type=_named(limits.NAME))
    url: str = Field(default="", sa_type=_named(limits.PATH))
    """Where it serves the inference protocol; informative."""
    labels: dict[str, Any] = _json()
    device: dict[str, Any] = _json()
    epoch: int = Field(default=0)
    state: str = Field(default="enrolled", sa_type=_named(limits.SHORT))
    """enrolled | retired"""
    desired_revision: int = Field(default=0)
    """Grows with every change of its assignments: what the long poll waits for."""
    seen_at: float | None = _time(nullable=True)
    created_at: float = _time()


class Assignment(SQLModel, table=True):
    """What a host should hold of a model, and what it says that it holds."""

    __tablename__ = "assignment"
    host_id: str = Field(primary_key=True, sa_type=_named(limits.ID), foreign_key="host.id")
    model_id: int = Field(primary_key=True, foreign_key="model.id")
    generation: int = Field(default=1)
    slots: list[Any] = _json(list)
    """[{version, variant, artifact, role, weight, mirror}] as schemas.Slot."""
    rollout_id: int | None = Field(default=None, foreign_key="rollout.id")
    observed: dict[str, Any] = _json()
    """The host's last report for this model, as schemas.ObservedModel."""
    observed_at: float | None = _time(nullable=True)
    requests: int = _bytes()
    """Since this generation went live."""
    errors: int = _bytes()
    input_errors: int = _counted()
    refused: int = _counted()
    """As schemas.Interval counts them."""
    last_interval: str = Field(default="", sa_type=_named(limits.ID))
    assigned_at: float = _time()
    live_at: float | None = _time(nullable=True)
    """When the host first reported this generation live."""


class Rollout(SQLModel, table=True):
    """The recorded, resumable move of a fleet from one version to another, in waves."""

    __tablename__ = "rollout"
    __table_args__ = (
        Index(
            "uq_rollout_active",
            "model_id",
            "fleet",
            unique=True,
            sqlite_where=_ACTIVE,
            postgresql_where=_ACTIVE,
        ),
    )
    id: int | None = Field(default=None, primary_key=True)
    model_id: int = Field(foreign_key="model.id", index=True)
    fleet: str = Field(default="{}", sa_type=_named(limits.PATH))
    """Canonical JSON of the labels that choose its hosts."""
    number: int
    """The version that is rolled out."""
    variants: dict[str, Any] = _json()
    """What each kind of host gets, chosen at the start: {kind: {"variant", "artifact", "reason"}}; the key "" is for
    every other kind, and always there."""
    from_number: int | None = Field(default=None)
    """The champion when it started: what a roll back returns to. None: nothing served before."""
    from_variants: dict[str, Any] = _json()
    """What each kind of host had of `from_number`, in the same form; empty when nothing served."""
    status: str = Field(default="running", sa_type=_named(limits.SHORT), index=True)
    reason: str = _prose()
    settings: dict[str, Any] = _json()
    """recipe.RolloutSettings at its start: a later recipe does not change a rollout under way."""
    wave: int = Field(default=0)
    """Waves assigned so far."""
    step: int = Field(default=0)
    state: dict[str, Any] = _json()
    """What next_step carries between steps: wave hosts, bake start, lost hosts; the judge's floats later."""
    request: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    """A person's wish not yet acted on: {verb, actor, reason}."""
    actor: str = Field(default="", sa_type=_named(limits.ACTOR))
    revision: int = Field(default=1)
    created_at: float = _time()
    finished_at: float | None = _time(nullable=True)


class RolloutStep(SQLModel, table=True):
    """One step that did something, with what it saw: enough to explain a rollout afterwards."""

    __tablename__ = "rollout_step"
    __table_args__ = (UniqueConstraint("rollout_id", "number"),)
    id: int | None = Field(default=None, primary_key=True)
    rollout_id: int = Field(foreign_key="rollout.id", index=True)
    number: int
    action: str = Field(sa_type=_named(limits.UNIT))
    detail: dict[str, Any] = _json()
    observations: dict[str, Any] = _json()
    actor: str = Field(default="", sa_type=_named(limits.ACTOR))
    created_at: float = _time()


class Token(SQLModel, table=True):
    """A bearer token's hash; the token is shown once. Role: viewer, publisher, approver, admin, host or enrol."""

    __tablename__ = "token"
    id: int | None = Field(default=None, primary_key=True)
    hash: str = Field(unique=True, sa_type=_named(limits.ID))
    role: str = Field(sa_type=_named(limits.SHORT))
    name: str = Field(default="", sa_type=_named(limits.NAME))
    host_id: str | None = Field(default=None, sa_type=_named(limits.ID))
    expires_at: float | None = _time(nullable=True)
    used_at: float | None = _time(nullable=True)
    revoked_at: float | None = _time(nullable=True)
    created_at: float = _time()


class Lease(SQLModel, table=True):
    """What must be single among equal daemons. `epoch` grows with every change of owner and fences the old one."""

    __tablename__ = "lease"
    name: str = Field(primary_key=True, sa_type=_named(limits.ID))
    owner: str = Field(default="", sa_type=_named(limits.NAME))
    epoch: int = Field(default=0)
    until: float = Field(default=0.0, sa_column=Column(Double, nullable=False))
