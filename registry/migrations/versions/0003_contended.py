"""Benchmarks: intervals of the ratios, and what else took the machine"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_INTERVALS = ("speedup_low", "speedup_high", "throughput_low", "throughput_high")


def upgrade() -> None:
    for name in _INTERVALS:
        op.add_column("benchmark", sa.Column(name, sa.Double(), nullable=True))
    op.add_column("benchmark", sa.Column("contended", sa.Text(), nullable=False, server_default=""))


def downgrade() -> None:
    for name in ("contended", *_INTERVALS):
        op.drop_column("benchmark", name)
