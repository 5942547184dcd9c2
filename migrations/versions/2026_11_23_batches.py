"""Batches: how many jobs are left, what they came to, and keys that stand for a batch."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "c2d7a41f90be"
down_revision = "5c1f0e7a9b36"
phase = "expand"

_JSON = postgresql.JSONB(none_as_null=True, astext_type=sa.Text())


def upgrade() -> None:
    op.add_column("batches", sa.Column("metadata", _JSON, server_default="{}", nullable=False))
    op.add_column("batches", sa.Column("priority", sa.Integer(), server_default="0", nullable=False))
    op.add_column("batches", sa.Column("jobs_left", sa.Integer(), server_default="0", nullable=False))
    op.add_column("batches", sa.Column("totals", _JSON, nullable=True))
    op.add_column(
        "batches", sa.Column("opened_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False)
    )
    op.create_index("ix_batches_newest", "batches", ["tenant_id", sa.text("created_at DESC"), sa.text("id DESC")])
    op.add_column("idempotency_keys", sa.Column("batch_id", sa.Uuid(), nullable=True))
    op.create_foreign_key(
        op.f("fk_idempotency_keys_batch_id"), "idempotency_keys", "batches", ["batch_id"], ["id"], ondelete="CASCADE"
    )


def downgrade() -> None:
    op.drop_constraint(op.f("fk_idempotency_keys_batch_id"), "idempotency_keys", type_="foreignkey")
    op.drop_column("idempotency_keys", "batch_id")
    op.drop_index("ix_batches_newest", table_name="batches")
    for name in ("opened_at", "totals", "jobs_left", "priority", "metadata"):
        op.drop_column("batches", name)
