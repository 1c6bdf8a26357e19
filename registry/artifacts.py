"""Variants and what was found of them: the artifact, its blobs, metrics, gate results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import delete, insert, select
from sqlmodel import col

from weighbridge.registry.db import Session, insert_into, insert_or_skip
from weighbridge.registry.errors import NotFound
from weighbridge.registry.lifecycle import VariantStatus
from weighbridge.registry.models import ArtifactBlob, Blob, GateResult, Metric, Variant, Version
from weighbridge.registry.schemas import GateResult as WireGate
from weighbridge.registry.schemas import Metric as WireMetric
from weighbridge.registry.spelling import nearest

TENSORS = "tensors."
"""How the gates begin that validation judges; all others are of an evaluation."""


def store_artifact(
    tx: Session,
    version_id: int,
    variant: str = "original",
    *,
    artifact_digest: str,
    blobs: Mapping[str, int],
    size: int = 0,
) -> Variant:
    """Note a variant's artifact and every blob that a host needs for it ({digest: bytes}; the manifest is added).

    `size`: bytes of its weights. The variant stays pending: the version's judgement, or its own jobs, make it ready.
    """
    needed = {artifact_digest: -1, **blobs}
    blob = insert_into(tx, Blob)
    noted = blob.on_conflict_do_update(
        index_elements=[col(Blob.digest)], set_={"size": blob.excluded.size}, where=col(Blob.size) < 0
    )
    tx.execute(
        noted,
        [{"digest": digest, "size": size} for digest, size in sorted(needed.items())],
    )
    tx.execute(
        insert_into(tx, ArtifactBlob).on_conflict_do_nothing(),
        [{"artifact_digest": artifact_digest, "blob_digest": digest} for digest in sorted(needed)],
    )
    fresh = Variant(version_id=version_id, name=variant, artifact_digest=artifact_digest)
    row = insert_or_skip(tx, fresh) or find_variant(tx, version_id, variant)
    row.artifact_digest, row.status, row.reason, row.size = artifact_digest, VariantStatus.PENDING, "", size
    tx.flush()
    return row


def find_variant(tx: Session, version_id: int, name: str = "original") -> Variant:
    """Raises NotFound."""
    mine = select(Variant).where(col(Variant.version_id) == version_id, col(Variant.name) == name)
    row = tx.scalars(mine, execution_options={"populate_existing": True}).one_or_none()
    if row is None:
        raise no_variant(tx, version_id, name)
    return row


def no_variant(tx: Session, version_id: int, name: str) -> NotFound:
    """That a version has no such variant, with the one that is spelled most like it."""
    known = tx.scalars(select(col(Variant.name)).where(col(Variant.version_id) == version_id)).all()
    number = tx.scalars(select(col(Version.number)).where(col(Version.id) == version_id)).one_or_none()
    return NotFound("variant", f"{name} of version {number}", nearest(name, known))


def record_metrics(tx: Session, variant_id: int, metrics: Sequence[WireMetric], *, judgement: int) -> None:
    """Write what this judgement measured, in place of what an earlier attempt of it wrote."""
    tx.execute(delete(Metric).where(col(Metric.variant_id) == variant_id, col(Metric.judgement) == judgement))
    rows = [{"variant_id": variant_id, "judgement": judgement, **metric.model_dump()} for metric in metrics]
    if rows:
        tx.execute(insert(Metric), rows)


def record_gates(tx: Session, variant_id: int, results: Sequence[WireGate], *, judgement: int, of: str = "") -> None:
    """Write this judgement's gate results, in place of what an earlier attempt of it wrote.

    `of`: only the gates whose names begin so are replaced; without it, those of no other stage (`TENSORS`).
    """
    mine = (col(GateResult.variant_id) == variant_id, col(GateResult.judgement) == judgement)
    named = col(GateResult.gate).startswith(of or TENSORS, autoescape=True)
    tx.execute(delete(GateResult).where(*mine, named if of else ~named))
    rows = [{"variant_id": variant_id, "judgement": judgement, **result.model_dump()} for result in results]
    if rows:
        tx.execute(insert(GateResult), rows)


def metrics(tx: Session, version_id: int, variant: str = "original") -> list[Metric]:
    """What the version's present judgement measured of a variant."""
    statement = (
        select(Metric)
        .join(Variant, col(Variant.id) == col(Metric.variant_id))
        .join(Version, col(Version.id) == col(Variant.version_id))
        .where(col(Version.id) == version_id, col(Variant.name) == variant)
        .where(col(Metric.judgement) == col(Version.judgement))
    )
    return list(tx.scalars(statement.order_by(col(Metric.id))))


def blobs(tx: Session, artifact_digest: str) -> dict[str, int]:
    """The blobs of an artifact, itself included: {digest: bytes, -1 where nobody noted it}."""
    joined = select(col(Blob.digest), col(Blob.size)).join(
        ArtifactBlob, col(ArtifactBlob.blob_digest) == col(Blob.digest)
    )
    return {row[0]: row[1] for row in tx.execute(joined.where(col(ArtifactBlob.artifact_digest) == artifact_digest))}
