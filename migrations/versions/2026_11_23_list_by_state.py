"""Lists of jobs in one state, which may be few among very many.

The index is made beside the service, which goes on writing meanwhile. Workers of the version before know nothing of it.
"""

import sqlalchemy as sa
from alembic import op

revision = "5a0c9be31d47"
down_revision = "1d94b6e2f07a"

NAME = "ix_jobs_state_newest"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # it waits for transactions that are older, and holds nobody up
        op.drop_index(NAME, "jobs", if_exists=True, postgresql_concurrently=True)  # half of one, made by who died
        op.create_index(
            NAME, "jobs", ["tenant_id", "state", sa.text("created_at DESC"), sa.text("id DESC")],
            postgresql_concurrently=True,
        )  # fmt: skip
        op.execute("SET lock_timeout = '5s'")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index(NAME, "jobs", postgresql_concurrently=True)
