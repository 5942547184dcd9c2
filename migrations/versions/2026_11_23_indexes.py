"""Indexes for lists of jobs in one state, for the oldest step of a mode, which may be few among very many, and for what
housekeeping removes.

They are made beside the service, which goes on writing meanwhile. Workers of the version before do without them, and
keep `ix_steps_oldest`, which the next version drops.
"""

import sqlalchemy as sa
from alembic import op

revision = "5a0c9be31d47"
down_revision = "5c81e07d3b92"
phase = "expand"

_NEWEST = (sa.text("created_at DESC"), sa.text("id DESC"))
_INDEXES = (
    ("ix_jobs_state_newest", "jobs", ("tenant_id", "state", *_NEWEST), None),
    ("ix_steps_oldest_of_mode", "steps", ("queue", "mode", "id"), "state = 'queued'"),
    (
        "ix_jobs_source_expires_at", "jobs", ("source_expires_at",),
        "source_removed_at IS NULL AND source_expires_at < expires_at",
    ),
    ("ix_batches_deleted_at", "batches", ("deleted_at",), "deleted_at IS NOT NULL"),
    ("ix_idempotency_keys_job_id", "idempotency_keys", ("job_id",), "job_id IS NOT NULL"),
    ("ix_idempotency_keys_batch_id", "idempotency_keys", ("batch_id",), "batch_id IS NOT NULL"),
)  # fmt: skip


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # it waits for transactions that are older, and holds nobody up
        for name, table, columns, where in _INDEXES:
            # Half of one is left by who died making it.
            op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
            op.create_index(
                name, table, list(columns), postgresql_where=sa.text(where) if where else None,
                postgresql_concurrently=True,
            )  # fmt: skip
        op.execute("RESET lock_timeout")


def downgrade() -> None:
    for name, table, _, _ in reversed(_INDEXES):
        op.drop_index(name, table)
