"""Endpoints that are told of everything: rotation, disabling, lanes, and a log of every attempt.

Workers of the version before go on beside it; jobs that end in one of them are not told to endpoints.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "1d94b6e2f07a"
down_revision = "7e20c4d58a13"
phase = "expand"

_MOMENT = sa.DateTime(timezone=True)
_PENDING = sa.text("state = 'pending'")
_NEWEST = (sa.text("created_at DESC"), sa.text("id DESC"))


def upgrade() -> None:
    op.add_column("jobs", sa.Column("ends", sa.Integer(), server_default="0", nullable=False))
    for name in ("description", "disabled_reason"):
        op.add_column("webhook_endpoints", sa.Column(name, sa.Text(), nullable=True))
    for name in ("failing_since", "paused_until"):
        op.add_column("webhook_endpoints", sa.Column(name, _MOMENT, nullable=True))
    op.add_column(
        "webhook_endpoints",
        sa.Column("old_secrets", postgresql.JSONB(astext_type=sa.Text()), server_default="[]", nullable=False),
    )
    op.add_column("webhook_deliveries", sa.Column("lane", sa.Text(), server_default="", nullable=False))
    op.add_column("webhook_deliveries", sa.Column("attempts_before", sa.Integer(), server_default="0", nullable=False))
    op.create_index(
        "ix_webhook_deliveries_lane", "webhook_deliveries", ["lane", "next_attempt_at"], postgresql_where=_PENDING
    )
    op.create_index("ix_webhook_deliveries_newest", "webhook_deliveries", ["tenant_id", *_NEWEST])
    op.create_index("ix_webhook_deliveries_endpoint", "webhook_deliveries", ["endpoint_id", *_NEWEST])
    op.create_index("ix_webhook_deliveries_finished_at", "webhook_deliveries", ["finished_at"])
    op.create_table(
        "webhook_attempts",
        sa.Column("delivery_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("latency_seconds", sa.Float(), nullable=False),
        sa.Column("reply", sa.Text(), nullable=True),
        sa.Column("ended_at", _MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["webhook_deliveries.id"],
            name=op.f("fk_webhook_attempts_delivery_id"), ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("delivery_id", "number", name=op.f("pk_webhook_attempts")),
    )  # fmt: skip


def downgrade() -> None:
    op.drop_table("webhook_attempts")
    for name in ("finished_at", "endpoint", "newest", "lane"):
        op.drop_index(f"ix_webhook_deliveries_{name}", table_name="webhook_deliveries")
    for name in ("attempts_before", "lane"):
        op.drop_column("webhook_deliveries", name)
    for name in ("old_secrets", "paused_until", "failing_since", "disabled_reason", "description"):
        op.drop_column("webhook_endpoints", name)
    op.drop_column("jobs", "ends")
