"""What a host keeps on its disk: who it is, what it should hold, and the verified blobs."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from weighbridge.registry.schemas import Desired
from weighbridge.storage.atomic import new_file

Kept = TypeVar("Kept", bound=BaseModel)


class HostFolderInUse(RuntimeError):
    """Another process serves as this host."""


class Identity(BaseModel):
    """What the registry gave at the first enrolment."""

    model_config = ConfigDict(frozen=True)

    id: str
    token: str | None = None


class HostFolder:
    """`<folder>/identity.json`, `desired.json`, `blobs/`. Only their user may read the files: one holds a token."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.blobs = folder, folder / "blobs"
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process. Raises HostFolderInUse."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise HostFolderInUse(f"{self.folder}: another host agent runs here: give each its own") from exc
            yield

    def identity(self) -> Identity | None:
        return self._read(Identity, "identity.json")

    def keep_identity(self, identity: Identity) -> None:
        self._write(identity, "identity.json")

    def desired(self) -> Desired | None:
        """What the registry wanted last: what a host serves that starts while the registry is away."""
        return self._read(Desired, "desired.json")

    def keep_desired(self, desired: Desired) -> None:
        self._write(desired, "desired.json")

    def _read(self, kind: type[Kept], name: str) -> Kept | None:
        try:
            return kind.model_validate_json((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None

    def _write(self, kept: BaseModel, name: str) -> None:
        with new_file(self.folder / name) as file:
            (self.folder / file.name).chmod(0o600)
            file.write(kept.model_dump_json().encode())
