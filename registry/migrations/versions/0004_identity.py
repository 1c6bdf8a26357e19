"""Identity is content: a version's weights, what is a duplicate of what, and when weights were written"""

import json
from collections.abc import Iterator
from datetime import datetime
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op
from blake3 import blake3

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_VERSION = sa.table(
    "version",
    sa.column("id", sa.Integer),
    sa.column("model_id", sa.Integer),
    sa.column("number", sa.Integer),
    sa.column("status", sa.String),
    sa.column("facts", sa.JSON),
    sa.column("weights", sa.String),
    sa.column("written_at", sa.Double),
    sa.column("created_at", sa.Double),
)
_FILE = sa.table(
    "checkpoint_file", sa.column("version_id"), sa.column("key"), sa.column("modified"), sa.column("digest")
)

_RESERVED = {"eval.safetensors", "train.safetensors", "golden.safetensors"}
_UNKNOWN = {"discovered", "superseded", "quarantined"}
"""Their weights were not read to the end, or were not theirs alone to answer for."""


def upgrade() -> None:
    op.add_column("version", sa.Column("weights", sa.String(length=64), nullable=True))
    op.add_column("version", sa.Column("duplicate_of", sa.Integer(), nullable=True))
    op.add_column("version", sa.Column("written_at", sa.Double(), nullable=False, server_default="0"))
    _know_weights()
    op.create_index("ix_version_model_written", "version", ["model_id", "written_at"], unique=False)
    op.create_index("uq_version_model_id_weights", "version", ["model_id", "weights"], unique=True)


def _know_weights() -> None:
    """Fill in what the files' rows tell. Of equal weights the one that may be served is it, then the older one."""
    connection = op.get_bind()
    connection.execute(sa.update(_VERSION).values(written_at=_VERSION.c.created_at))
    owners: dict[tuple[int, str], tuple[bool, int, int]] = {}
    for version_id, files in groupby(_files(connection), key=lambda row: row[0]):
        weights = [row for row in files if _is_weights(row.key)]
        version = connection.execute(sa.select(_VERSION).where(_VERSION.c.id == version_id)).one()
        values: dict[str, Any] = {}
        if dates := [datetime.fromisoformat(row.modified).timestamp() for row in weights if row.modified]:
            values["written_at"] = max(dates)
        digests = sorted(row.digest or "" for row in weights)
        if digests and all(digests):
            digest = blake3(json.dumps(digests, separators=(",", ":")).encode()).hexdigest()
            values["facts"] = {**version.facts, "weights": digest}
            if version.status not in _UNKNOWN:
                rank = (version.status != "ready", version.number, version.id)
                key = (version.model_id, digest)
                owners[key] = min(rank, owners.get(key, rank))
        if values:
            connection.execute(sa.update(_VERSION).where(_VERSION.c.id == version_id).values(**values))
    for (_, digest), (_, _, owner) in owners.items():
        connection.execute(sa.update(_VERSION).where(_VERSION.c.id == owner).values(weights=digest))


def _files(connection: sa.Connection) -> Iterator[Any]:
    """Every version's files, a page at a time: there may be a million."""
    query = sa.select(_FILE.c.version_id, _FILE.c.key, _FILE.c.modified, _FILE.c.digest).order_by(_FILE.c.version_id)
    last = 0
    while ids := list(
        connection.scalars(sa.select(_VERSION.c.id).where(_VERSION.c.id > last).order_by(_VERSION.c.id).limit(500))
    ):
        last = ids[-1]
        yield from connection.execute(query.where(_FILE.c.version_id.in_(ids))).all()


def _is_weights(key: str) -> bool:
    name = key.rsplit("/", 1)[-1]
    return name.endswith(".safetensors") and name not in _RESERVED and not name.startswith(".")


def downgrade() -> None:
    op.drop_index("uq_version_model_id_weights", table_name="version")
    op.drop_index("ix_version_model_written", table_name="version")
    op.drop_column("version", "written_at")
    op.drop_column("version", "duplicate_of")
    op.drop_column("version", "weights")
