"""Whose fault it was: what failed on grounds of its input, and what a version's contract refused"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_COLUMNS = ("input_errors", "refused")


def upgrade() -> None:
    for name in _COLUMNS:
        op.add_column("assignment", sa.Column(name, sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    for name in reversed(_COLUMNS):
        op.drop_column("assignment", name)
