"""Settings of the registry and of everybody who opens its database or hears its notifications."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from weighbridge.inbound.settings import InboundSettings


class RegistrySettings(InboundSettings):
    """The API server, its database and who may call it."""

    host: str = Field(default="127.0.0.1", description="Address to listen on. Every call needs a token, here too.")
    port: int = Field(default=8400, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    url: str = Field(default="", description="Where clients and hosts reach the API; empty: from host and port.")
    database: SecretStr = Field(
        default=SecretStr("sqlite:///weighbridge.db"),
        description="SQLAlchemy URL: sqlite:///FILE, or postgresql+psycopg://USER:PASSWORD@HOST/NAME.",
    )
    trusted_proxies: tuple[str, ...] = Field(
        default=(),
        description="Addresses or networks of proxies in front of it; what any other one forwards is refused.",
    )
    socket: Path | None = Field(
        default=None,
        description="Unix socket by which this machine's own commands and hosts call it; empty: in the data folder.",
    )
    token: SecretStr | None = Field(
        default=None,
        description="Bearer token that this process calls the API with; the registry lets in an admin by its own.",
    )
    enrolments: dict[str, str] = Field(
        default_factory=dict,
        description="Hosts let in without asking: name, and SHA-256 (hex) of the one-time token that it starts with.",
    )
    poll_seconds: float = Field(default=0.25, gt=0, description="How often long polls look without a notification (s).")
    silent_seconds: float = Field(
        default=15.0,
        gt=0,
        description="A host that says nothing for so long is shown as silent (s); three times host.report_seconds.",
    )
    page_size: int = Field(default=100, ge=1, le=1000, description="Rows a page when the caller names no number.")
    presign_seconds: int = Field(
        default=0,
        ge=0,
        description="Blobs are answered with a presigned link of the store for this long (s); 0: through the registry.",
    )
    page_bytes: int = Field(
        default=1 << 20, ge=1 << 16, description="Most bytes of a listing's page; what does not fit is on the next."
    )
    calls: int = Field(default=256, ge=4, description="Most calls at once, a quarter of them of one token; then 503.")
    waiting_calls: int = Field(
        default=768, ge=4, description="The same for calls that wait for news, as hosts do; counted apart."
    )
    body_seconds: float = Field(default=30.0, gt=0, description="Longest wait for all of a JSON body (s).")
    held_bytes: int = Field(
        default=64 << 20, ge=16 << 20, description="Bytes of request bodies that are held at once; then 503."
    )
    max_upload_bytes: int = Field(default=1 << 30, ge=1, description="Largest upload of a template's program (bytes).")
    tls_certificate: str = Field(
        default="", description="PEM file of the server's certificate chain; empty: plain HTTP."
    )
    tls_key: str = Field(default="", description="PEM file of the certificate's key.")


class BrokerSettings(BaseModel):
    """Valkey or Redis: Celery's transport and the wake-up channel. Nothing is kept only there."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"),
        description="redis://[:PASSWORD@]HOST:PORT/DB, rediss://… or redis+socket:///PATH; memory:// for tests.",
    )
    channel: str = Field(default="weighbridge", description="Prefix of the notification channels and queue names.")
