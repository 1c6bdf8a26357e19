"""How to reach an S3-compatible store; the settings file embeds this."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator


class S3Options(BaseModel):
    """Everything about an S3 endpoint besides the bucket. Without keys, boto3's own chain finds credentials."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str | None = Field(None, description="The endpoint, e.g. `http://127.0.0.1:9000`; unset: AWS.")
    region: str | None = Field(None, description="The region; `us-east-1` where a custom endpoint needs none.")
    access_key: SecretStr | None = Field(None, description="The access key id.")
    secret_key: SecretStr | None = Field(None, description="The secret access key.")
    session_token: SecretStr | None = Field(None, description="The session token of temporary credentials.")
    verify: bool | str = Field(True, description="Check TLS certificates; a path names a CA bundle to check them with.")
    path_style: bool = Field(True, description="`endpoint/bucket/key` rather than `bucket.endpoint/key`.")
    max_concurrency: int = Field(8, ge=1, le=256, description="Connections, and parts of one object in flight.")
    part_size: int = Field(
        16 << 20, ge=5 << 20, description="Bytes of one part; larger objects are sent in several parts."
    )
    attempts: int = Field(4, ge=1, description="Tries of one request, the first included, with exponential waits.")
    connect_timeout: float = Field(5.0, gt=0, description="Seconds to wait for a connection.")
    read_timeout: float = Field(60.0, gt=0, description="Seconds to wait for the next bytes.")

    @field_validator("verify", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        """The environment has only text: `false` there is no CA bundle's path."""
        return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value
