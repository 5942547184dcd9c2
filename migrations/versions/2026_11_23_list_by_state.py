"""Lists of jobs in one state, and the oldest step of a mode, which may be few among very many.

The indexes are made beside the service, which goes on writing meanwhile. Workers of the version before do without them,
and keep `ix_steps_oldest`, which the next version drops.
"""

import sqlalchemy as sa
from alembic import op

revision = "5a0c9be31d47"
down_revision = "1d94b6e2f07a"

_STATE, _OLDEST = "ix_jobs_state_newest", "ix_steps_oldest_of_mode"


def upgrade() -> None:
    newest = (sa.text("created_at DESC"), sa.text("id DESC"))
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")  # it waits for transactions that are older, and holds nobody up
        for name, table in ((_STATE, "jobs"), (_OLDEST, "steps")):  # half of one is left by who died making it
            op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
        op.create_index(_STATE, "jobs", ["tenant_id", "state", *newest], postgresql_concurrently=True)
        op.create_index(
            _OLDEST, "steps", ["queue", "mode", "id"],
            postgresql_where=sa.text("state = 'queued'"), postgresql_concurrently=True,
        )  # fmt: skip
        op.execute("SET lock_timeout = '5s'")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index(_OLDEST, "steps", postgresql_concurrently=True)
        op.drop_index(_STATE, "jobs", postgresql_concurrently=True)
