"""Uploads in parts."""

import sqlalchemy as sa
from alembic import op

revision = "5c1f0e7a9b36"
down_revision = "5b1f0c9e7a34"
phase = "expand"


def upgrade() -> None:
    op.add_column("uploads", sa.Column("part_bytes", sa.BigInteger(), nullable=True))
    op.add_column("uploads", sa.Column("multipart_id", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("uploads", "multipart_id")
    op.drop_column("uploads", "part_bytes")
