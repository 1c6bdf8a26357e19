"""What is proven of a variant before anybody may serve it: it is what it promised, and loads twice to the same bits."""

from __future__ import annotations

from collections.abc import Sequence

from weighbridge.engines import golden
from weighbridge.engines.errors import GoldenMismatch
from weighbridge.engines.load import load
from weighbridge.engines.manifest import Golden, Manifest
from weighbridge.engines.protocols import BlobPath, Session
from weighbridge.registry.recipe import VariantWish
from weighbridge.workers.compression import artifact, report
from weighbridge.workers.compression.types import BuildFailed, Built, Original

_SLACK = 1.02
_HEADER, _GRAPH, _TENSOR = 4096, 32 << 10, 512
"""Bytes of a file, of an ONNX graph, and of a tensor's names and offsets, which a promise does not count."""
_NAMED = 5


def check(original: Original, built: Built, made: Manifest, wish: VariantWish) -> None:
    """Raise BuildFailed for a silent no-op, in whole or in part."""
    _check_rows(original, built)
    _check_changed(original.manifest, made)
    _check_size(original, built, wish, artifact.weights_size(made))


_ROWS = 4
"""Of a golden, unless its rows depend on each other."""


def record_golden(manifest: Manifest, blobs: BlobPath, original: Original, built: Built) -> tuple[bytes, Golden]:
    """Load a variant twice, prove equal answers, record them: (the golden file, what the manifest says; no digest yet).

    Raises BuildFailed, EngineError.
    """
    rows = 1 if built.per_batch else _ROWS
    first = _load(manifest, blobs, original)
    try:
        answers = golden.make_reference(first, rows)
    finally:
        first.close()
    again = _load(manifest, blobs, original)
    try:
        if golden.make_reference(again, rows) != answers:
            raise BuildFailed("loaded twice, it gives different answers: a host could not prove what it serves")
        return answers, _golden(again, answers, built.compute_dtypes or _dtypes(manifest, blobs))
    finally:
        again.close()


def _golden(session: Session, answers: bytes, computed: Sequence[str]) -> Golden:
    tolerance = golden.variant_tolerance(computed)
    try:
        golden.check(session, answers, *tolerance)
    except GoldenMismatch as wrong:
        raise BuildFailed(f"it answers a row alone unlike in a batch: {wrong}") from wrong
    return Golden(digest="0" * 64, size=len(answers), **tolerance._asdict())


def _load(manifest: Manifest, blobs: BlobPath, original: Original) -> Session:
    return load(manifest, blobs, original.device, original.factories, threads=original.threads)


def _check_rows(original: Original, built: Built) -> None:
    """Every tensor of the original has a row, and at least one became another."""
    names = artifact.tensor_shapes(original).keys()
    if missing := sorted(names - {row.name for row in built.tensors}):
        raise BuildFailed(f"the method says nothing of {missing[0]} ({len(missing)} of {len(names)} tensors)")
    if built.program is None and all(row.action == report.KEPT for row in built.tensors):
        raise BuildFailed(f"nothing changed{_kept(original, built)}")


def _check_changed(original: Manifest, made: Manifest) -> None:
    """Whatever the rows say."""
    ours, theirs = {file.digest for file in original.files}, {file.digest for file in made.files}
    if ours == theirs and made.program.digest == original.program.digest:
        raise BuildFailed("nothing changed: the files are the original's, byte for byte")


def _check_size(original: Original, built: Built, wish: VariantWish, size: int) -> None:
    before = artifact.weights_size(original.manifest)
    if wish.max_ratio is None:
        limit, rule = built.promised_ratio * _SLACK + _overhead(built) / before, "the method promises"
    else:
        limit, rule = wish.max_ratio, "max_ratio allows"
    if size > limit * before:
        seen = f"{size:,} of {before:,} bytes are a ratio of {size / before:.3f}"
        raise BuildFailed(f"{seen}, {rule} {limit:.3f}{_kept(original, built)}")


def _overhead(built: Built) -> int:
    files = sum(_GRAPH if path.endswith(".onnx") else _HEADER for path in built.files)
    return files + _TENSOR * len(built.tensors)


def _kept(original: Original, built: Built) -> str:
    kept = report.kept_layers(built.tensors, artifact.matrices(original))
    more = f" and {len(kept) - _NAMED} more" if len(kept) > _NAMED else ""
    return f"; kept: {'; '.join(kept[:_NAMED])}{more}" if kept else ""


def _dtypes(manifest: Manifest, blobs: BlobPath) -> list[str]:
    return sorted({info.dtype for header in artifact.headers(manifest, blobs) for info in header.tensors.values()})
