"""What a host keeps on its disk: who it is, what it should hold, and the verified blobs."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from weighbridge.registry.schemas import Desired
from weighbridge.storage import private

log = logging.getLogger(__name__)

Kept = TypeVar("Kept", bound=BaseModel)


class HostFolderInUse(RuntimeError):
    """Another process serves as this host."""


class HostFolderBroken(RuntimeError):
    """A file of the folder is not what a host wrote."""


class Identity(BaseModel):
    """What the registry gave at the first enrolment."""

    model_config = ConfigDict(frozen=True)

    id: str
    token: str | None = None


class HostFolder:
    """`<folder>/identity.json`, `desired.json`, `blobs/`. Only their user may read the files: one holds a token."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.blobs, self.identity_file = folder, folder / "blobs", folder / "identity.json"
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
        """None before the first enrolment. Raises HostFolderBroken."""
        return _read(Identity, self.identity_file)

    def keep_identity(self, identity: Identity) -> None:
        _write(identity, self.identity_file)

    def desired(self) -> Desired | None:
        """What the registry wanted last: what a host serves that starts while the registry is away."""
        try:
            return _read(Desired, self.folder / "desired.json")
        except HostFolderBroken as exc:
            log.warning("%s; waiting for the registry instead", exc)
            return None

    def keep_desired(self, desired: Desired) -> None:
        _write(desired, self.folder / "desired.json")


def _read(kind: type[Kept], path: Path) -> Kept | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as exc:
        raise HostFolderBroken(f"{path} is not readable ({exc.error_count()} errors): restore it or remove it") from exc


def _write(kept: BaseModel, path: Path) -> None:
    private.write(path, kept.model_dump_json().encode())
