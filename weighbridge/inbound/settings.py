"""Settings that every HTTP server of ours has: what it lets those who knock do before they have asked anything."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class InboundSettings(BaseModel):
    """By which names a server is called, and how long and how often a connection may keep it waiting."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    server_names: tuple[str, ...] = Field(
        default=(),
        description="Names that this server is called by (Host header) beside addresses, names without a dot, the "
        "machine's own and that in `url`: models.example.com, *.example.com; * allows any. Others are answered 421.",
    )
    origins: tuple[str, ...] = Field(
        default=(),
        description="Web pages beside its own that may call it (Origin header): https://app.example.com. Others: 403.",
    )
    connections: int = Field(
        default=1000,
        ge=1,
        description="Most connections; for one more, the one that let us wait longest ends, or it is answered 503.",
    )
    connections_per_address: int = Field(
        default=500, ge=1, description="Most connections from one address; a proxy, on loopback too, is one address."
    )
    header_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Longest wait for a request's headers to be whole, and for a new connection's first byte (s).",
    )
    stall_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Longest wait for the next 64 KiB of a request's body, or its end; answers must be taken so too "
        "(s).",
    )
    idle_seconds: float = Field(
        default=75.0, gt=0, description="How long a connection may stay open between two requests (s)."
    )
