"""The mark of a worker's process, by which others on its machine can tell that it is gone.

Workers of the version before have none, and what they hold is given back when their leases end.
"""

import sqlalchemy as sa
from alembic import op

revision = "c47d10f6ab25"
down_revision = "5a0c9be31d47"
phase = "expand"


def upgrade() -> None:
    op.add_column("workers", sa.Column("mark", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("workers", "mark")
