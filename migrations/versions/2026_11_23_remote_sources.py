"""Sources that are fetched: a step of its own, and jobs whose kind is not known before it. Uploads keep theirs.

There is no way back while such jobs are kept: the database refuses it, as an older version could not go on with them.
"""

import sqlalchemy as sa
from alembic import op

revision = "7e20c4d58a13"
down_revision = "c2d7a41f90be"
phase = "expand"


def upgrade() -> None:
    op.alter_column("jobs", "kind", existing_type=sa.Text(), nullable=True)
    op.add_column("uploads", sa.Column("kind", sa.Text(), nullable=True))
    _limit_kinds("fetch", "probe", "infer", "finalize")


def downgrade() -> None:
    _limit_kinds("probe", "infer", "finalize")
    op.alter_column("jobs", "kind", existing_type=sa.Text(), nullable=False)
    op.drop_column("uploads", "kind")


def _limit_kinds(*kinds: str) -> None:
    op.drop_constraint(op.f("ck_steps_kind"), "steps", type_="check")
    listed = ", ".join(f"'{kind}'" for kind in kinds)
    op.create_check_constraint(op.f("ck_steps_kind"), "steps", f"kind IN ({listed})")
