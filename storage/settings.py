"""Where the watched bucket is, and where Weighbridge keeps its own artifacts."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from weighbridge.storage.keys import check_prefix
from weighbridge.storage.options import S3Options
from weighbridge.storage.protocols import Store


class StorageSettings(BaseModel):
    """The watched bucket or folder, the artifacts, and how to reach an S3 endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url: str = Field(
        default="drops", description="Where checkpoints are dropped: s3://BUCKET, file:///FOLDER, or a folder."
    )
    prefix: str = Field(default="", description="Only keys below this are watched: PREFIX/MODEL/CHECKPOINT.")
    artifacts: str = Field(default="", description="Where artifacts are written; empty: beside the checkpoints.")
    artifacts_prefix: str = Field(default=".weighbridge", description="Keys of artifacts lie below this.")
    s3: S3Options = Field(default_factory=S3Options, description="How to reach the S3 endpoint.")

    @model_validator(mode="after")
    def _artifacts_are_not_watched(self) -> Self:
        """Artifacts that intake could take for a model would be validated as checkpoints, for ever."""
        check_prefix(self.prefix)
        check_prefix(self.artifacts_prefix)
        if self.artifacts not in ("", self.url):
            return self
        own, watched = self.artifacts_prefix.strip("/"), self.prefix.strip("/")
        if not own:
            raise ValueError("artifacts_prefix: needed where artifacts lie beside the checkpoints")
        inside = not watched or own == watched or own.startswith(f"{watched}/")
        below = own.removeprefix(watched).lstrip("/")
        if inside and not below.startswith("."):
            raise ValueError(f"artifacts_prefix: {own!r} lies in the watched prefix: begin its name with a dot")
        return self

    def open_source(self, *, create: bool = False) -> Store:
        """The watched store. Makes no request; `create` makes a missing folder. Raises StorageError."""
        from weighbridge.storage.urls import open_store

        return open_store(self.url, self.s3, create=create)

    def open_artifacts(self, *, create: bool = False) -> Store:
        """The store that artifacts are written to, below `artifacts_prefix`. Raises StorageError."""
        from weighbridge.storage.urls import open_store

        return open_store(self.artifacts or self.url, self.s3, create=create)

    def open_models(self) -> Store:
        """The watched store as publishers see it: keys begin with a model's name. Raises StorageError."""
        from weighbridge.storage.urls import open_store

        return open_store(self.url, self.s3, below=self.prefix.strip("/"))
