"""Settings of a host agent."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from weighbridge.inbound.settings import InboundSettings


class HostSettings(InboundSettings):
    """One inference server: where it serves, what it keeps, how it loads."""

    name: str = Field(default="", description="The host's name; empty: the machine's.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels that fleets choose hosts by.")
    address: str = Field(default="127.0.0.1", description="Address to serve inference on.")
    port: int = Field(default=8500, ge=0, le=65535, description="Port to serve inference on; 0 takes a free one.")
    url: str = Field(default="", description="Where clients reach this host; empty: from address and port.")
    data: Path = Field(default=Path("host"), description="Folder of the host's identity and verified blobs.")
    enrolment_token: SecretStr | None = Field(default=None, description="One-time token for the first start.")
    device: str = Field(default="cpu", description="Device to serve on: cpu, cuda, cuda:1.")
    threads: int = Field(default=1, ge=1, description="Torch threads an engine child.")
    poll_seconds: float = Field(default=30.0, gt=0, description="Longest wait of one poll for assignments (s).")
    report_seconds: float = Field(
        default=5.0, gt=0, description="How often statistics are reported without a change (s)."
    )
    keep_previous: bool = Field(
        default=True, description="Keep the last version loaded for instant rollback while memory allows."
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="Longest wait for requests of a version that goes (s)."
    )
    load_seconds: float = Field(default=600.0, gt=0, description="Longest load of a variant (s).")
    request_seconds: float = Field(
        default=60.0, gt=0, description="Longest inference, from the moment that its request is here whole (s)."
    )
    hang_seconds: float = Field(
        default=60.0,
        gt=0,
        description="An engine child that has work and is silent for this long is replaced; one that loads, when it "
        "neither computes nor reads for this long (s).",
    )
    queue: int = Field(default=512, ge=1, description="Most requests that may wait for one version; then 503.")
    batch: int = Field(
        default=1,
        ge=1,
        description="Most rows of waiting requests that are computed as one; above 1 last bits may depend on the load.",
    )
    warm_up: int = Field(default=10, ge=1, description="Requests a version answers for itself before it may go live.")
    max_body_bytes: int = Field(default=64 << 20, ge=1, le=2**32 - 1, description="Largest request body (bytes).")
    held_bytes: int = Field(
        default=512 << 20, ge=1, description="Request bodies that may be held at once (bytes); then 503."
    )
    held_bytes_per_address: int = Field(
        default=256 << 20, ge=1, description="Request bodies of one address that may be held at once (bytes); then 429."
    )
    max_inflation: int = Field(
        default=100,
        ge=1,
        description="Times the size of a compressed body that it may unpack to, where that is over 1 MiB; then 413.",
    )
    request_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Memory that one request may take in an engine child (bytes); 0: a share of the machine's.",
    )
    factories: tuple[str, ...] = Field(
        default=(), description="Patterns of factories this host may run: package.module:name."
    )
