"""Settings of the daemon."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class DaemonSettings(BaseModel):
    """How the loops pace themselves, and the webhook that bucket notifications arrive at."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    list_seconds: float = Field(default=60.0, gt=0, description="How often the whole bucket is listed (s).")
    look_seconds: float = Field(
        default=0.25, gt=0, description="Pause before looking again at a checkpoint being written (s)."
    )
    look_max_seconds: float = Field(
        default=30.0, gt=0, description="Longest pause between two looks at one that waits (s)."
    )
    settle_seconds: float = Field(
        default=0.5,
        ge=0,
        description="A folder proven only by its structure must be unchanged this long: more may follow (s).",
    )
    poll_seconds: float = Field(
        default=0.25, gt=0, description="How often the database is polled without a notification (s)."
    )
    reconcile_seconds: float = Field(
        default=5.0, gt=0, description="How often leases, plans and sent jobs are checked (s)."
    )
    in_flight: int = Field(
        default=64, ge=1, description="Most jobs of a queue handed to the broker and not yet claimed."
    )
    resend_seconds: float = Field(
        default=60.0, gt=0, description="A sent job not claimed after this long is sent again (s)."
    )
    control_seconds: float = Field(
        default=2.0, gt=0, description="A rollout step not claimed after this long is run here (s)."
    )
    watch: bool = Field(default=True, description="Watch a local folder for changes (inotify) besides listing it.")
    webhook_host: str = Field(default="127.0.0.1", description="Address of the bucket-notification listener.")
    webhook_port: int | None = Field(default=None, description="Its port; unset: no listener; 0: a free port.")
    webhook_token: SecretStr | None = Field(
        default=None, description="Bearer token that notifications must carry; needed with a port."
    )
