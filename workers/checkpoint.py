"""The first half of validation: is every byte what it claims to be? Nothing of a checkpoint is executed here.

Then one pass over each file (workers.taking): digest, copy into the blob store, finiteness and statistics of tensors.
Every scan here takes time in proportion to what it scans, whatever that is: strangers choose it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from weighbridge.engines.manifest import ArtifactFile
from weighbridge.engines.tensor_stats import TensorStats
from weighbridge.storage import companions, identity, names
from weighbridge.storage.errors import StorageError
from weighbridge.storage.index import MalformedIndex, read_index
from weighbridge.storage.protocols import Get, Ref
from weighbridge.storage.published import MalformedManifest, read_published
from weighbridge.storage.safetensors_header import Header, MalformedHeader, ShortFile, read_header
from weighbridge.storage.streaming import digest_bytes
from weighbridge.workers.taking import Taken

_MAX_GOLDEN_ROWS = 65_536
"""The program answers all of them at once; of no bytes each there could be any number."""

Take = Callable[[str, Ref, Header | None], Taken]
"""Reads one file (its name, its pin, of weights its header) to its end: workers.taking, by whoever holds the store."""


class Unsafe(Exception):
    """The checkpoint is hostile, corrupt or not provably safe; the message names the file, the tensor and the rule."""


@dataclass(frozen=True)
class Contents:
    """What the bytes are. `files` are all that were read, `weights` those of them that serve."""

    files: tuple[ArtifactFile, ...]
    weights: tuple[ArtifactFile, ...]
    stats: tuple[TensorStats, ...]
    golden: bytes | None = field(repr=False)
    left_out: Mapping[str, Ref] = field(default_factory=dict)
    """What nobody uses, by path."""

    @property
    def source_digest(self) -> str:
        """BLAKE3 of the canonical JSON of path, size and digest of every file that was read."""
        rows = sorted([file.path, file.size, file.digest] for file in self.files)
        return digest_bytes(json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode())

    @property
    def weights_digest(self) -> str:
        """What tells these weights from others, wherever they lie."""
        return identity.digest(file.digest for file in self.weights)

    @property
    def tensors(self) -> dict[str, TensorStats]:
        return {one.name: one for one in self.stats}


def read(source: Get, path: str, files: Iterable[Ref], take: Take) -> Contents:
    """Prove a checkpoint's files and take them in; `path` is its key, or its folder ending in `/`.

    What is small is parsed before `take` reads what is large. Raises Unsafe; PreconditionFailed or ObjectNotFound when
    the bucket holds other content than was pinned.
    """
    everything = {_relative(path, ref.key): ref for ref in files}
    refs = {name: ref for name, ref in everything.items() if companions.is_read(name)}
    try:
        headers = {name: read_header(source, ref) for name, ref in refs.items() if names.is_weights(name)}
        _refuse_disagreement(source, refs, headers)
        published = read_published(source, refs[names.PUBLISHED]) if names.PUBLISHED in refs else None
        golden = _golden(source, refs)
        vouched = {file.path for file in published.files} if published else set()
        refs |= {name: ref for name, ref in everything.items() if name in vouched}
    except (MalformedHeader, MalformedIndex, MalformedManifest, ShortFile) as wrong:
        raise Unsafe(str(wrong)) from wrong
    stats: list[TensorStats] = []
    found: dict[str, ArtifactFile] = {}
    for name, ref in refs.items():
        found[name], its = take(name, ref, headers.get(name))
        stats += its
    for file in published.files if published else ():
        if file.path not in found:
            raise Unsafe(f"{names.PUBLISHED} names {file.path}, which is not there")
        if found[file.path].digest != file.digest:
            raise Unsafe(f"{file.path} has the digest {found[file.path].digest}, {names.PUBLISHED} says {file.digest}")
    left_out = {name: ref for name, ref in everything.items() if not companions.is_read(name)}
    return Contents(tuple(found.values()), tuple(found[name] for name in headers), tuple(stats), golden, left_out)


def _refuse_disagreement(source: Get, refs: Mapping[str, Ref], headers: Mapping[str, Header]) -> None:
    """No tensor twice, none at all never, and an index that says what the shards say."""
    holder: dict[str, str] = {}
    for name, header in headers.items():
        for tensor in header.tensors:
            if (other := holder.setdefault(tensor, name)) != name:
                raise Unsafe(f"tensor {tensor} is both in {other} and in {name}")
    if not holder:
        raise Unsafe("the checkpoint holds no tensors")
    for name, ref in refs.items():
        if name.endswith(names.INDEX):
            folder = name.rpartition("/")[0] + "/" * ("/" in name)
            for tensor, shard in read_index(source, ref).weight_map.items():
                if holder.get(tensor) != folder + shard:
                    where = holder.get(tensor, "nowhere")
                    raise Unsafe(f"{name} says that {tensor} is in {folder}{shard}; it is in {where}")


def _golden(source: Get, refs: Mapping[str, Ref]) -> bytes | None:
    """The author's golden, if there is one: as strictly read as the weights, and small."""
    ref = refs.get(names.GOLDEN)
    if ref is None:
        return None
    if ref.size > 64 << 20:
        raise Unsafe(f"{names.GOLDEN} has {ref.size:,} bytes, at most {64 << 20:,} are read")
    for name, tensor in read_header(source, ref).tensors.items():
        if 0 in tensor.shape or tensor.shape[:1] > (_MAX_GOLDEN_ROWS,):
            rule = f"a golden has between one and {_MAX_GOLDEN_ROWS:,} rows, and none is empty"
            raise Unsafe(f"{names.GOLDEN}: {name} has the shape {list(tensor.shape)}: {rule}")
    return source.get(ref.key, if_match=ref)


def _relative(path: str, key: str) -> str:
    root = path if path.endswith("/") else path.rpartition("/")[0] + "/" * ("/" in path)
    if not key.startswith(root):
        raise StorageError(f"{key} is no file of {path}", key=key)
    return key[len(root) :]
