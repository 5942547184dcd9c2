"""Retention: what a tenant has kept and for how long, sources that go before results, and what goes in slices.

Workers of the version before go on beside it; the source of a job that ends in one of them goes with its result.
"""

import sqlalchemy as sa
from alembic import op

revision = "5c81e07d3b92"
down_revision = "1d94b6e2f07a"
phase = "expand"

_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    for name in ("keep_results_seconds", "keep_sources_seconds"):
        op.add_column("tenants", sa.Column(name, sa.Float(), nullable=True))
    op.add_column("tenants", sa.Column("swept_at", _MOMENT, nullable=True))
    op.add_column("tenants", sa.Column("swept_to", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("keep_source_seconds", sa.Float(), nullable=True))
    for name in ("source_expires_at", "source_removed_at"):
        op.add_column("jobs", sa.Column(name, _MOMENT, nullable=True))
    for table in ("uploads", "batches", "webhook_endpoints"):
        op.add_column(table, sa.Column("deleted_at", _MOMENT, nullable=True))


def downgrade() -> None:
    for table in ("webhook_endpoints", "batches", "uploads"):
        op.drop_column(table, "deleted_at")
    for name in ("source_removed_at", "source_expires_at", "keep_source_seconds"):
        op.drop_column("jobs", name)
    for name in ("swept_to", "swept_at", "keep_sources_seconds", "keep_results_seconds"):
        op.drop_column("tenants", name)
