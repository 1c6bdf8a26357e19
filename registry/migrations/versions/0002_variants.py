"""Variants: their wishes, tensors and benchmarks, the workers that measure them, a choice per kind of host"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Other tables refer to variant, version and rollout: SQLite would check their rows while it rebuilt these in a batch,
# so that columns come and go by ALTER TABLE, with a default that the rows there take.
_EMPTY = sa.text("'{}'")

_ROLLOUT = sa.table(
    "rollout",
    sa.column("id", sa.Integer),
    sa.column("model_id", sa.Integer),
    sa.column("variant", sa.String),
    sa.column("artifact_digest", sa.String),
    sa.column("from_number", sa.Integer),
    sa.column("variants", sa.JSON),
    sa.column("from_variants", sa.JSON),
)
_VERSION = sa.table("version", sa.column("id"), sa.column("model_id"), sa.column("number"))
_VARIANT = sa.table("variant", sa.column("version_id"), sa.column("name"), sa.column("artifact_digest"))


def upgrade() -> None:
    op.create_table(
        "worker",
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("machine", sa.String(length=255), nullable=False),
        sa.Column("queues", sa.JSON(), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("hardware", sa.JSON(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_worker")),
    )
    op.create_index(op.f("ix_worker_kind"), "worker", ["kind"], unique=False)

    op.create_table(
        "variant_tensor",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("variant_id", sa.Integer(), nullable=False),
        sa.Column("judgement", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=1024), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("bytes_in", sa.BigInteger(), nullable=False),
        sa.Column("bytes_out", sa.BigInteger(), nullable=False),
        sa.Column("sqnr", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["variant_id"], ["variant.id"], name=op.f("fk_variant_tensor_variant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_variant_tensor")),
        sa.UniqueConstraint(
            "variant_id", "judgement", "name", name=op.f("uq_variant_tensor_variant_id_judgement_name")
        ),
    )
    op.create_table(
        "benchmark",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("variant_id", sa.Integer(), nullable=False),
        sa.Column("artifact_digest", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("hardware", sa.JSON(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("p50", sa.Double(), nullable=True),
        sa.Column("p99", sa.Double(), nullable=True),
        sa.Column("throughput", sa.Double(), nullable=True),
        sa.Column("memory", sa.BigInteger(), nullable=True),
        sa.Column("energy", sa.Double(), nullable=True),
        sa.Column("load_seconds", sa.Double(), nullable=True),
        sa.Column("speedup", sa.Double(), nullable=True),
        sa.Column("throughput_ratio", sa.Double(), nullable=True),
        sa.Column("spread", sa.Double(), nullable=True),
        sa.Column("finding", sa.String(length=16), nullable=False),
        sa.Column("rows", sa.JSON(), nullable=False),
        sa.Column("environment", sa.JSON(), nullable=False),
        sa.Column("source", sa.String(length=255), nullable=False),
        sa.Column("measured_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["variant_id"], ["variant.id"], name=op.f("fk_benchmark_variant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_benchmark")),
    )
    op.create_index("ix_benchmark_variant_kind", "benchmark", ["variant_id", "kind"], unique=False)

    op.add_column("version", sa.Column("train_pin", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("variant", sa.Column("wish", sa.JSON(), nullable=False, server_default=_EMPTY))
    op.add_column("variant", sa.Column("facts", sa.JSON(), nullable=False, server_default=_EMPTY))
    op.add_column("variant", sa.Column("size", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("job", sa.Column("part", sa.String(length=64), nullable=False, server_default=""))
    op.add_column("job", sa.Column("needs", sa.JSON(), nullable=False, server_default=_EMPTY))
    with op.batch_alter_table("job") as job:
        job.alter_column("queue", type_=sa.String(length=96), existing_type=sa.String(length=32), nullable=False)

    op.add_column("rollout", sa.Column("variants", sa.JSON(), nullable=False, server_default=_EMPTY))
    op.add_column("rollout", sa.Column("from_variants", sa.JSON(), nullable=False, server_default=_EMPTY))
    _keep_choices()
    op.drop_column("rollout", "artifact_digest")
    op.drop_column("rollout", "variant")


def _keep_choices() -> None:
    """What every host got of a rollout's version, and had of the one before, in the words of one choice per kind."""
    connection = op.get_bind()
    before = (
        sa.select(_VERSION.c.model_id, _VERSION.c.number, _VARIANT.c.artifact_digest)
        .join_from(_VERSION, _VARIANT, _VARIANT.c.version_id == _VERSION.c.id)
        .where(_VARIANT.c.name == "original", _VARIANT.c.artifact_digest.is_not(None))
    )
    artifacts = {(row.model_id, row.number): row.artifact_digest for row in connection.execute(before)}
    for row in connection.execute(sa.select(_ROLLOUT)).all():
        old = artifacts.get((row.model_id, row.from_number))
        values = {
            "variants": _one(row.variant, row.artifact_digest),
            "from_variants": _one("original", old) if old is not None else {},
        }
        connection.execute(sa.update(_ROLLOUT).where(_ROLLOUT.c.id == row.id).values(**values))


def _one(variant: str, artifact: str) -> dict[str, dict[str, str]]:
    return {"": {"variant": variant, "artifact": artifact, "reason": ""}}


def downgrade() -> None:
    op.add_column("rollout", sa.Column("variant", sa.String(length=64), nullable=False, server_default="original"))
    op.add_column("rollout", sa.Column("artifact_digest", sa.String(length=64), nullable=False, server_default=""))
    connection = op.get_bind()
    for row in connection.execute(sa.select(_ROLLOUT)).all():
        values = {"variant": row.variants[""]["variant"], "artifact_digest": row.variants[""]["artifact"]}
        connection.execute(sa.update(_ROLLOUT).where(_ROLLOUT.c.id == row.id).values(**values))
    op.drop_column("rollout", "from_variants")
    op.drop_column("rollout", "variants")
    with op.batch_alter_table("job") as job:
        job.alter_column("queue", type_=sa.String(length=32), existing_type=sa.String(length=96), nullable=False)
    op.drop_column("job", "needs")
    op.drop_column("job", "part")
    op.drop_column("variant", "size")
    op.drop_column("variant", "facts")
    op.drop_column("variant", "wish")
    op.drop_column("version", "train_pin")
    op.drop_table("benchmark")
    op.drop_table("variant_tensor")
    op.drop_table("worker")
