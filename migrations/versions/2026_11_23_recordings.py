"""Recordings: what the probe found, the plan and the progress of each chunk."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "5b1f0c9e7a34"
down_revision = "d34857ebdd24"
phase = "expand"

_JSON = postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def upgrade() -> None:
    op.add_column("jobs", sa.Column("recording", _JSON, nullable=True))
    op.add_column("jobs", sa.Column("chunks_left", sa.Integer(), nullable=True))
    op.add_column("steps", sa.Column("plan", _JSON, nullable=True))
    op.add_column("steps", sa.Column("frames_done", sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    op.drop_column("steps", "frames_done")
    op.drop_column("steps", "plan")
    op.drop_column("jobs", "chunks_left")
    op.drop_column("jobs", "recording")
