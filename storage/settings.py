"""Where the watched bucket is, and where Weighbridge keeps its own artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from weighbridge.storage.keys import check_prefix
from weighbridge.storage.options import S3Options
from weighbridge.storage.protocols import Store

MOVE = "move them and set storage.artifacts (docs/operations.md, 'Where artifacts lie')"


class StorageSettings(BaseModel):
    """The watched bucket or folder, the artifacts, and how to reach an S3 endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    url: str = Field(
        default="drops", description="Where checkpoints are dropped: s3://BUCKET, file:///FOLDER, or a folder."
    )
    prefix: str = Field(default="", description="Only keys below this are watched: PREFIX/MODEL/CHECKPOINT.")
    artifacts: str = Field(
        default="",
        description="Where artifacts are written, out of publishers' reach: s3://BUCKET, file:///FOLDER, or "
        "a folder. Empty: `up` has them in its data folder, other roles beside the checkpoints.",
    )
    artifacts_prefix: str = Field(default=".weighbridge", description="Keys of artifacts lie below this.")
    s3: S3Options = Field(default_factory=S3Options, description="How to reach the S3 endpoint.")
    artifacts_s3: S3Options = Field(
        default_factory=S3Options,
        description="How to reach the artifacts, where that differs: keys of their own. What is unset is as in s3.",
    )

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

        return open_store(self.url, self.s3, create=create, used=self.prefix)

    def open_artifacts(self, *, create: bool = False) -> Store:
        """The store that artifacts are written to, below `artifacts_prefix`. Raises StorageError."""
        from weighbridge.storage.urls import open_store

        return open_store(self.artifacts or self.url, self.artifacts_options, create=create, used=self.artifacts_prefix)

    @property
    def artifacts_options(self) -> S3Options:
        """How to reach the artifacts: as the watched bucket, but for what is set for them."""
        usual = S3Options()
        differs = {name: value for name, value in self.artifacts_s3 if value != getattr(usual, name)}
        return self.s3.model_copy(update=differs)

    @property
    def artifacts_below(self) -> str | None:
        """The prefix below which artifacts lie in the watched bucket or folder; None where they lie in another."""
        own = self.artifacts_prefix.strip("/")
        if self.artifacts in ("", self.url):
            return own
        within = _within(self.artifacts, self.url)
        return None if within is None else "/".join(filter(None, (within, own)))

    @property
    def exposed(self) -> str | None:
        """What to say where publishers can write to the artifacts, and MOVE what to do; None where they lie apart."""
        below, watched = self.artifacts_below, self.prefix.strip("/")
        if below is None or (watched and not f"{below}/".startswith(f"{watched}/")):
            return None
        return (
            f"artifacts lie where publishers write ({below}/ in the watched store): nothing of theirs is believed, but "
            "they can make jobs fail"
        )

    def open_models(self) -> Store:
        """The watched store as publishers see it: keys begin with a model's name. Raises StorageError."""
        from weighbridge.storage.urls import open_store

        return open_store(self.url, self.s3, below=self.prefix.strip("/"))


def _within(inner: str, outer: str) -> str | None:
    """Where one place lies in another, as a key; None where it does not, and where URLs cannot tell."""
    if "://" in inner or "://" in outer:
        one, other = (f"{url.rstrip('/')}/" for url in (inner, outer))
        return one.removeprefix(other).rstrip("/") if one.startswith(other) else None
    here, there = (Path(folder).expanduser().resolve() for folder in (inner, outer))
    return here.relative_to(there).as_posix() if here != there and here.is_relative_to(there) else None
