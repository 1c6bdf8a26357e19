"""Blobs that are read whole: the bytes that are acted on are the bytes that were hashed."""

from __future__ import annotations

from blake3 import blake3
from pydantic import ValidationError

from weighbridge.engines.errors import LoadError
from weighbridge.engines.manifest import Manifest
from weighbridge.engines.protocols import BlobPath


def read(blobs: BlobPath, digest: str, what: str) -> bytes:
    """A small blob; `what` names it in errors. Raises LoadError for other bytes, and what `blobs` raises."""
    data = blobs(digest).read_bytes()
    if (seen := blake3(data).hexdigest()) != digest:
        raise LoadError(f"{what}: the file's digest is {seen}, not {digest}")
    return data


def read_manifest(blobs: BlobPath, artifact: str) -> Manifest:
    """The manifest of an artifact. Raises LoadError for other bytes, or a form unknown to this release."""
    try:
        return Manifest.model_validate_json(read(blobs, artifact, f"the manifest of artifact {artifact}"))
    except ValidationError as exc:
        raise LoadError(f"artifact {artifact}: this release does not know the form of its manifest: {exc}") from exc
