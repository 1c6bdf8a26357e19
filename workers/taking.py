"""One file of a checkpoint taken in: read once, digested, and of weights kept and looked at on the way."""

from __future__ import annotations

from typing import NamedTuple

from weighbridge.engines.manifest import ArtifactFile
from weighbridge.engines.stream import Inspector
from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.storage.blobs import Blobs
from weighbridge.storage.errors import PreconditionFailed
from weighbridge.storage.protocols import Get, Ref
from weighbridge.storage.safetensors_header import Header
from weighbridge.storage.streaming import DigestingReader, Progress, chunks


class Taken(NamedTuple):
    """A file with its digest, and the statistics of its tensors; none of what is not weights."""

    file: ArtifactFile
    stats: list[TensorStats]


def take(
    source: Get, name: str, ref: Ref, header: Header | None, blobs: Blobs, progress: Progress | None = None
) -> Taken:
    """Read one file once: weights, which have a header, go into the blob store and are looked at, anything else is only
    digested. Raises PreconditionFailed."""
    with source.open(ref.key, if_match=ref) as stream:
        if header is None:
            reader = DigestingReader(stream, size=ref.size, progress=progress)
            for _ in chunks(reader):  # type: ignore[arg-type]
                pass
            if reader.size != ref.size:
                raise PreconditionFailed(f"{ref.key} has {reader.size:,} bytes, not {ref.size:,}", key=ref.key)
            return Taken(ArtifactFile(path=name, size=reader.size, digest=reader.digest), [])
        with Inspector(stream, header) as inspector:
            blob = blobs.put_stream(inspector, expected=ref.size, progress=progress)  # type: ignore[arg-type]
            return Taken(ArtifactFile(path=name, size=blob.size, digest=blob.digest), inspector.stats())
