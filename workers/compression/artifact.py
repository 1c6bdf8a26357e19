"""From what a method built to a manifest and facts, and from the shards of a variant to one build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weighbridge.engines.manifest import ArtifactFile, Encoding, Golden, Manifest
from weighbridge.engines.protocols import BlobPath
from weighbridge.registry.schemas import VariantTensor
from weighbridge.storage.blobs import Keep
from weighbridge.storage.safetensors_header import Header, header_length, parse_header
from weighbridge.storage.streaming import digest_file
from weighbridge.workers.compression import report
from weighbridge.workers.compression.types import BuildFailed, Built, Original

_NO_GOLDEN = Golden(digest="0" * 64, size=0, rtol=0.0, atol=0.0)


def draft(variant: str, original: Original, built: Built) -> tuple[Manifest, dict[str, Path]]:
    """The manifest without its golden, and the local files by digest. Nothing is stored yet."""
    files = [_file(path, local) for path, local in sorted(built.files.items())]
    local = {file.digest: built.files[file.path] for file in files}
    program = built.program or original.manifest.program
    if built.program_file is not None:
        digest = digest_file(built.program_file)
        local[digest] = built.program_file
        program = program.model_copy(update={"digest": digest})
    elif program.kind == "onnx":
        program = program.model_copy(update={"digest": _the_onnx(files).digest})
    manifest = original.manifest.model_copy(
        update={
            "variant": variant,
            "files": tuple(files),
            "program": program,
            "binding": original.manifest.binding if built.binding is None else dict(sorted(built.binding.items())),
            "golden": _NO_GOLDEN,
            "engine": built.engine,
            "encoding": built.encoding,
            "ties": {} if program.kind == "onnx" else original.manifest.ties,
        }
    )
    return manifest, local


def facts(original: Original, built: Built, size: int) -> dict[str, Any]:
    """What the registry keeps of a variant besides its artifact."""
    before = weights_size(original.manifest)
    return {
        "tensors": [row.model_dump(mode="json") for row in built.tensors],
        "size": size,
        "original_size": before,
        "ratio": round(size / before, 6),
        "promised_ratio": round(built.promised_ratio, 6),
        "kept_layers": report.kept_layers(built.tensors, matrices(original)),
        "notes": list(built.notes),
        "calibration": built.calibration,
    }


def weights_size(manifest: Manifest) -> int:
    """Bytes of an artifact's weights."""
    return sum(file.size for file in manifest.files)


def headers(manifest: Manifest, blobs: BlobPath) -> list[Header]:
    """Of its safetensors files."""
    found = []
    for file in manifest.files:
        if file.path.endswith(".safetensors"):
            with blobs(file.digest).open("rb") as opened:
                length = header_length(opened.read(64 << 10), file.path, file.size)
                opened.seek(8)
                found.append(parse_header(opened.read(length), file.path))
    return found


def tensor_shapes(original: Original) -> dict[str, tuple[int, ...]]:
    """Of every tensor in the original's files."""
    found = headers(original.manifest, original.cache)
    return {name: info.shape for header in found for name, info in header.tensors.items()}


def matrices(original: Original) -> frozenset[str]:
    """The tensors of two dimensions and more: what there is to compress."""
    return frozenset(name for name, shape in tensor_shapes(original).items() if len(shape) > 1)


def keep_shard(built: Built, blobs: Keep) -> dict[str, Any]:
    """Store a shard's files; return as JSON what `join` needs of it."""
    if built.program is not None or built.program_file is not None:
        raise BuildFailed("a shard cannot bring a program of its own")
    stored = {path: blobs.put_file(local) for path, local in sorted(built.files.items())}
    return {
        "files": [{"path": path, "digest": blob.digest, "size": blob.size} for path, blob in stored.items()],
        "tensors": [row.model_dump(mode="json") for row in built.tensors],
        "engine": built.engine,
        "binding": built.binding,
        "encoding": None if built.encoding is None else built.encoding.model_dump(mode="json"),
        "promised_ratio": built.promised_ratio,
        "compute_dtypes": list(built.compute_dtypes),
        "notes": list(built.notes),
        "calibration": built.calibration,
    }


def join(shards: Sequence[Mapping[str, Any]], cache: BlobPath) -> Built:
    """One build of all shards' files. Raises BuildFailed where they do not fit together."""
    if not shards:
        raise BuildFailed("there are no shards to join")
    rows = [VariantTensor.model_validate(row) for shard in shards for row in shard["tensors"]]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BuildFailed(f"two shards hold {twice[0]}")
    paths = [file["path"] for shard in shards for file in shard["files"]]
    if len(set(paths)) != len(paths):
        raise BuildFailed(f"two shards write a file of one name: {', '.join(sorted(paths))}")
    first = shards[0]
    for key in ("engine", "encoding", "binding", "calibration"):
        if any(shard[key] != first[key] for shard in shards):
            raise BuildFailed(f"the shards differ in their {key}: build the variant again")
    promised = sum(shard["promised_ratio"] * sum(row["bytes_in"] for row in shard["tensors"]) for shard in shards)
    return Built(
        files={file["path"]: cache(file["digest"]) for shard in shards for file in shard["files"]},
        tensors=tuple(sorted(rows, key=lambda row: row.name)),
        engine=dict(first["engine"]),
        binding=first["binding"],
        encoding=None if first["encoding"] is None else Encoding.model_validate(first["encoding"]),
        promised_ratio=promised / max(1, sum(row.bytes_in for row in rows)),
        compute_dtypes=tuple(sorted({dtype for shard in shards for dtype in shard["compute_dtypes"]})),
        notes=tuple(dict.fromkeys(note for shard in shards for note in shard["notes"])),
        calibration=first["calibration"],
    )


def _file(path: str, local: Path) -> ArtifactFile:
    return ArtifactFile(path=path, size=local.stat().st_size, digest=digest_file(local))


def _the_onnx(files: Sequence[ArtifactFile]) -> ArtifactFile:
    found = [file for file in files if file.path.endswith(".onnx")]
    if len(found) != 1:
        raise BuildFailed(f"an ONNX variant is one .onnx file, not {len(found)}")
    return found[0]
