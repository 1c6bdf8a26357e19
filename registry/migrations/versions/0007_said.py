"""What publishers and files say of a version, and which checkpoints only a person can help on"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "said",
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["version_id"], ["version.id"], name=op.f("fk_said_version_id")),
        sa.PrimaryKeyConstraint("version_id", "source", "name", name=op.f("pk_said")),
    )
    op.add_column("checkpoint", sa.Column("needs_person", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    op.drop_column("checkpoint", "needs_person")
    op.drop_table("said")
