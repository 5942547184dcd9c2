"""What a migration may do while the release before goes on beside it (docs/upgrades.md), read from its operations."""

from collections.abc import Callable
from io import StringIO

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.operations import Operations, ops
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory

from shared import db

BEFORE_ANY_TABLE_WAS_LARGE = {
    "d34857ebdd24",
    "5b1f0c9e7a34",
    "5c1f0e7a9b36",
    "c2d7a41f90be",
    "7e20c4d58a13",
    "1d94b6e2f07a",
}
"""These make indexes in one go: nobody ran anything before them."""
HISTORY: list[Script] = list(ScriptDirectory.from_config(db.migration_config("")).walk_revisions())


def watch(upgrade: Callable[[], None]) -> list[ops.MigrateOperation]:
    """What it would do; nothing is done."""
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": StringIO(), "transaction_per_migration": True}
    )
    seen: list[ops.MigrateOperation] = []
    with Operations.context(context) as operations, pytest.MonkeyPatch.context() as patched:
        patched.setattr(operations, "invoke", seen.append)
        upgrade()
    return seen


def find_harm(done: list[ops.MigrateOperation], *, large_tables: bool = True) -> list[str]:
    """What the release before would stumble over, or wait for."""
    new = {each.table_name for each in done if isinstance(each, ops.CreateTableOp)}
    added = {(each.table_name, each.column.name) for each in done if isinstance(each, ops.AddColumnOp)}
    dropped = {each.constraint_name for each in done if isinstance(each, ops.DropConstraintOp)}
    harm = []
    for each in done:
        if getattr(each, "table_name", getattr(each, "source_table", None)) in new:
            continue
        match each:
            case ops.AddColumnOp(column=column) if not column.nullable and column.server_default is None:
                harm.append(f"it inserts no {column.name}, which may not be NULL")
            case ops.AlterColumnOp() if each.modify_nullable is False or each.modify_type is not None:
                harm.append(f"{each.column_name} becomes narrower, or the table is written anew")
            case ops.AlterColumnOp() if each.modify_name is not None or each.modify_server_default is not False:
                harm.append(f"it knows {each.column_name} as it was")
            case ops.DropColumnOp() | ops.DropTableOp() | ops.RenameTableOp():
                harm.append("it uses what is gone")
            case ops.CreateCheckConstraintOp() if each.constraint_name not in dropped:
                harm.append(f"it does not know {each.constraint_name}")
            case ops.CreateForeignKeyOp() if not {(each.source_table, name) for name in each.local_cols} <= added:
                harm.append(f"it does not know {each.constraint_name}")
            case ops.CreateUniqueConstraintOp() | ops.CreatePrimaryKeyOp():
                harm.append(f"it does not know {each.constraint_name}")
            case ops.CreateIndexOp() if each.unique:
                harm.append(f"it does not know {each.index_name}")
            case ops.CreateIndexOp() if large_tables and not each.kw.get("postgresql_concurrently"):
                harm.append(f"nobody writes while {each.index_name} is made")
            case ops.DropIndexOp() if not each.kw.get("postgresql_concurrently"):
                harm.append(f"nobody reads while {each.index_name} is dropped")
            case ops.ExecuteSQLOp() if any(
                word in str(each.sqltext).upper() for word in ("ALTER ", "DROP ", "CREATE ")
            ):
                harm.append("SQL that nobody has looked at; use an operation")
    return harm


@pytest.mark.parametrize("script", HISTORY, ids=lambda script: script.revision)
def test_a_migration_says_whether_it_expands_or_contracts(script: Script) -> None:
    assert script.module.phase in ("expand", "contract")


@pytest.mark.parametrize(
    "script", [each for each in HISTORY if each.module.phase == "expand"], ids=lambda script: script.revision
)
def test_the_release_before_goes_on_beside_a_migration_that_expands(script: Script) -> None:
    done = watch(script.module.upgrade)
    assert done
    assert find_harm(done, large_tables=script.revision not in BEFORE_ANY_TABLE_WAS_LARGE) == []


@pytest.mark.parametrize(
    "harmful",
    [
        lambda: op.add_column("jobs", sa.Column("colour", sa.Text(), nullable=False)),
        lambda: op.alter_column("jobs", "kind", nullable=False),
        lambda: op.alter_column("jobs", "kind", type_=sa.Integer()),
        lambda: op.alter_column("jobs", "kind", new_column_name="sort"),
        lambda: op.alter_column("jobs", "ends", server_default=None),
        lambda: op.drop_column("jobs", "kind"),
        lambda: op.drop_table("jobs"),
        lambda: op.rename_table("jobs", "tasks"),
        lambda: op.create_check_constraint("ck_jobs_kind", "jobs", "kind <> ''"),
        lambda: op.create_foreign_key("fk_jobs_kind", "jobs", "tenants", ["kind"], ["name"]),
        lambda: op.create_unique_constraint("uq_jobs_kind", "jobs", ["kind"]),
        lambda: op.create_index("ix_jobs_kind", "jobs", ["kind"]),
        lambda: op.create_index("ix_jobs_kind", "jobs", ["kind"], unique=True, postgresql_concurrently=True),
        lambda: op.drop_index("ix_jobs_kind", "jobs"),
        lambda: op.execute("ALTER TABLE jobs DROP COLUMN kind"),
    ],
)
def test_what_would_harm_the_release_before_is_noticed(harmful: Callable[[], None]) -> None:
    """The rule above sees what would break it."""
    assert len(find_harm(watch(harmful))) == 1


def test_what_the_release_before_does_not_notice_is_allowed() -> None:
    def upgrade() -> None:
        op.create_table("colours", sa.Column("name", sa.Text(), nullable=False))
        op.create_index("uq_colours_name", "colours", ["name"], unique=True)
        op.add_column("jobs", sa.Column("colour", sa.Text(), nullable=True))
        op.add_column("jobs", sa.Column("shade", sa.Text(), server_default="", nullable=False))
        op.create_foreign_key("fk_jobs_colour", "jobs", "colours", ["colour"], ["name"])
        op.alter_column("jobs", "kind", nullable=True)
        with op.get_context().autocommit_block():
            op.drop_index("ix_jobs_colour", "jobs", if_exists=True, postgresql_concurrently=True)
            op.create_index("ix_jobs_colour", "jobs", ["colour"], postgresql_concurrently=True)

    assert find_harm(watch(upgrade)) == []
