"""Downloading by digest: every byte is verified, what is there already is kept, a broken transfer goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

import tenacity
from blake3 import blake3
from pydantic import BaseModel

from weighbridge.registry.client_http import Http, patiently
from weighbridge.registry.errors import Invalid
from weighbridge.storage.errors import DigestMismatch

Progress = Callable[[str, int, int], None]
"""Called with a file's path, the bytes of it that are here, and its size."""

CHUNK: Final = 1 << 20
_ATTEMPTS: Final = 8


class _File(BaseModel):
    path: str
    size: int
    digest: str


class _Manifest(BaseModel):
    """The part of an artifact's manifest (engines.manifest) that a download needs."""

    files: list[_File]


def blob(http: Http, digest: str) -> bytes:
    """A small blob, whole and verified. Raises NotFound, DigestMismatch."""
    data = http.send("GET", f"/v1/blobs/{digest}").content
    _verify(digest, blake3(data).hexdigest())
    return data


def stream(http: Http, digest: str, start: int = 0) -> Iterator[bytes]:
    """A blob's bytes from `start` on, unverified: whoever reads them to the end checks the digest."""
    with http.stream(f"/v1/blobs/{digest}", start=start) as response:
        if response.is_error:
            return
        skip = start if start and response.status_code != 206 else 0
        for chunk in response.iter_bytes():
            yield chunk[skip:]
            skip = max(skip - len(chunk), 0)


def artifact(http: Http, digest: str, folder: Path, progress: Progress | None) -> Path:
    """Put the files of an artifact into `folder`, each whole and verified or not at all; return the folder."""
    manifest = _Manifest.model_validate_json(blob(http, digest))
    targets = [(file, _inside(folder, file.path)) for file in manifest.files]
    for file, target in targets:
        fetch(http, file.digest, target, size=file.size, progress=progress, name=file.path)
    return folder


def fetch(
    http: Http, digest: str, target: Path, *, size: int, progress: Progress | None = None, name: str = ""
) -> None:
    """Put one blob at `target`. Goes on with what an earlier, broken call left. Raises DigestMismatch."""
    if target.is_file() and target.stat().st_size == size and _digest(target).hexdigest() == digest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{digest}.part")
    resumed = part.exists()
    told = lambda done: progress(name or target.name, done, size) if progress else None  # noqa: E731
    seen = _complete(http, digest, part, size, told)
    if seen != digest and resumed:  # What an earlier call left was wrong.
        part.unlink()
        seen = _complete(http, digest, part, size, told)
    if seen != digest:
        part.unlink()
    _verify(digest, seen)
    os.replace(part, target)


def _complete(http: Http, digest: str, part: Path, size: int, told: Callable[[int], object]) -> str:
    """Read what is missing of a part, across broken connections; return the digest of the whole."""
    retrying = patiently().copy(stop=tenacity.stop_after_attempt(_ATTEMPTS))
    return retrying(_append, http, digest, part, size, told)


def _append(http: Http, digest: str, part: Path, size: int, told: Callable[[int], object]) -> str:
    hasher = _digest(part) if part.exists() else blake3()
    with part.open("ab") as file:
        for chunk in stream(http, digest, file.tell()) if file.tell() < max(size, 1) else ():
            file.write(chunk)
            hasher.update(chunk)
            told(file.tell())
        file.flush()
        os.fsync(file.fileno())
    return hasher.hexdigest()


def _digest(path: Path) -> blake3:
    hasher = blake3()
    hasher.update_mmap(path)
    return hasher


def _inside(folder: Path, path: str) -> Path:
    """Where a file of the manifest goes. Raises Invalid for a path that leads out of the folder."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path or "\0" in path:
        raise Invalid(f"the artifact names a file {path!r}, which leads out of the download's folder")
    return folder / pure


def _verify(expected: str, seen: str) -> None:
    if seen != expected:
        raise DigestMismatch(f"blob {expected} arrived with the digest {seen}", expected=expected, seen=seen)


def upload(http: Http, path: Path) -> str:
    """Store a file as a blob; return its digest. What is there already costs no transfer's harm: the bytes are one."""
    digest = _digest(path).hexdigest()

    def chunks() -> Iterator[bytes]:
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                yield data

    http.upload(f"/v1/blobs/{digest}", chunks(), path.stat().st_size)
    return digest
