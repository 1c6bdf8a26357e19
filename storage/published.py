"""`weighbridge.json`: what `publish` writes last, naming every file of the checkpoint. Its presence is proof P0."""

from __future__ import annotations

import json
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from weighbridge.storage import names
from weighbridge.storage.errors import StorageError
from weighbridge.storage.keys import is_valid
from weighbridge.storage.protocols import Get, Ref
from weighbridge.storage.strict_json import InvalidJson, TruncatedJson, parse_object

FORMAT: Final = "weighbridge.checkpoint/1"
MAX_SIZE = 16 << 20
"""Bytes of a manifest that anybody will read."""


class MalformedManifest(StorageError, ValueError):
    """A `weighbridge.json` breaks its format; `truncated` says that it may only have been broken off."""

    def __init__(self, message: str, *, key: str, truncated: bool = False) -> None:
        super().__init__(message, key=key)
        self.truncated = truncated


class PublishedFile(BaseModel):
    """One file: its path below the checkpoint's folder, size in bytes, BLAKE3 in hex."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    size: int = Field(ge=0)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")


class Published(BaseModel):
    """The manifest of a published checkpoint. Unknown fields of later writers are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal["weighbridge.checkpoint/1"] = FORMAT
    files: tuple[PublishedFile, ...] = Field(min_length=1)
    metadata: dict[str, str] = Field(default_factory=dict)
    """The publisher's own notes: a commit, a run, an author."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags that the version shall have from the beginning."""

    @model_validator(mode="after")
    def _check_paths(self) -> Self:
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a path is named twice")
        for path in paths:
            if not is_valid(path) or path == names.PUBLISHED:
                raise ValueError(f"{path!r} is no valid path of a file")
        return self

    def canonical(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8."""
        fields = self.model_dump(mode="json")
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_published(store: Get, ref: Ref) -> Published:
    """Read the pinned manifest. Raises MalformedManifest naming field and rule, PreconditionFailed."""
    if ref.size > MAX_SIZE:
        raise MalformedManifest(f"{ref.key} has {ref.size:,} bytes, more than {MAX_SIZE:,}", key=ref.key)
    try:
        return Published.model_validate(parse_object(store.get(ref.key, if_match=ref)))
    except InvalidJson as error:
        truncated = isinstance(error, TruncatedJson)
        raise MalformedManifest(f"{ref.key}: {error}", key=ref.key, truncated=truncated) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "files"
        raise MalformedManifest(f"{ref.key}: {where}: {first['msg']}", key=ref.key) from error
