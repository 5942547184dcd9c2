"""Migrations on a real database: complete, reversible, safe to start twice, and never a stall for the service."""

import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import alembic.command
import psycopg
import pytest
from alembic.script import ScriptDirectory
from psycopg import sql
from sqlalchemy import create_engine, inspect, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from cli.local.servers import Servers
from shared import db
from shared.models import Base
from tests.integration.conftest import wait_until

ADVISORY_LOCK = 0x6D61736B
"""The same in every version, or an old and a new one would not wait for each other."""


@pytest.fixture
def empty_database(servers: Servers) -> Iterator[str]:
    """The URL of a database in which nothing is."""
    url = make_url(servers.postgres.url)
    name = sql.Identifier(f"empty_{uuid.uuid4().hex}")
    with psycopg.connect(
        url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
    ) as server:
        server.execute(sql.SQL("CREATE DATABASE {}").format(name))
        yield url.set(database=name.as_string().strip('"')).render_as_string(hide_password=False)
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def tables(url: str) -> set[str]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return set(inspect(connection).get_table_names()) - {"alembic_version"}


def revision(url: str) -> str | None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return found


def head(url: str) -> str | None:
    return ScriptDirectory.from_config(db.migration_config(url)).get_current_head()


def test_an_empty_database_gets_every_table(empty_database: str) -> None:
    db.upgrade(empty_database)
    assert tables(empty_database) == set(Base.metadata.tables)
    assert revision(empty_database) == head(empty_database)


def test_migrating_again_changes_nothing(empty_database: str) -> None:
    db.upgrade(empty_database)
    db.upgrade(empty_database)
    assert revision(empty_database) == head(empty_database)


def test_the_migrations_make_what_the_models_say(empty_database: str) -> None:
    """Raises when autogenerate would write another migration."""
    db.upgrade(empty_database)
    alembic.command.check(db.migration_config(empty_database))


def test_what_the_models_say_is_what_the_migrations_make(empty_database: str, database_url: str) -> None:
    """Autogenerate does not see checks and conditions of indexes; these are compared as the database has them."""
    engine = create_engine(empty_database, poolclass=NullPool)
    Base.metadata.create_all(engine)
    assert rules(empty_database) == rules(database_url)


def rules(url: str) -> set[tuple[str, ...]]:
    """Every constraint, index and column of our tables, in the words of PostgreSQL."""
    queries = (
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace AND contype <> 'n'",
        "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "SELECT table_name, column_name, concat_ws(' ', data_type, character_maximum_length, is_nullable,"
        " column_default, is_identity) FROM information_schema.columns WHERE table_schema = 'public'",
    )
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        found = {tuple(row) for query in queries for row in connection.execute(text(query))}
    return {row for row in found if row[0] != "alembic_version"}


def test_there_is_a_way_back_and_forth_again(empty_database: str) -> None:
    db.upgrade(empty_database)
    before = rules(empty_database)
    alembic.command.downgrade(db.migration_config(empty_database), "base")
    assert tables(empty_database) == set()
    db.upgrade(empty_database)
    assert rules(empty_database) == before


def test_history_has_one_end(empty_database: str) -> None:
    assert len(ScriptDirectory.from_config(db.migration_config(empty_database)).get_heads()) == 1


def test_processes_that_migrate_at_once_take_turns(empty_database: str) -> None:
    migrate = [sys.executable, "-c", "import sys; from shared import db; db.upgrade(sys.argv[1])", empty_database]
    engine = create_engine(empty_database, poolclass=NullPool)
    autocommit = {"isolation_level": "AUTOCOMMIT"}
    with engine.connect().execution_options(**autocommit) as first:  # a third one, so to speak, which is not done yet
        first.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": ADVISORY_LOCK})
        running = [subprocess.Popen(migrate, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        asking = "(query = 'ROLLBACK' OR query LIKE '%advisory_lock%') AND pid <> pg_backend_pid()"
        waiting = text(f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND {asking}")  # noqa: S608
        wait_until(lambda: first.scalar(waiting) == len(running))
        assert tables(empty_database) == set()
    ended = [(process.communicate(timeout=120)[1], process.returncode) for process in running]
    assert ended == [("", 0)] * 2
    assert tables(empty_database) == set(Base.metadata.tables)


def test_a_migration_gives_up_on_a_table_in_use_rather_than_stall_all_who_come_after_it(empty_database: str) -> None:
    db.upgrade(empty_database)
    before = rules(empty_database)
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.connect() as reader:
        reader.execute(text("SELECT count(*) FROM jobs"))  # its lock lasts as long as its transaction
        with pytest.raises(OperationalError, match="lock timeout"):
            alembic.command.downgrade(db.migration_config(empty_database), "base")
    assert set(Base.metadata.tables) >= tables(empty_database) > set(), "all or nothing of each is kept"
    db.upgrade(empty_database)
    assert rules(empty_database) == before


def test_a_migration_that_met_a_table_in_use_lets_others_through_and_tries_again(empty_database: str) -> None:
    db.upgrade(empty_database)
    engine = create_engine(empty_database, poolclass=NullPool)
    waiting = text("SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted")
    with engine.connect() as reader, engine.connect() as watcher, ThreadPoolExecutor(1) as aside:
        reader.execute(text("SELECT count(*) FROM jobs"))
        back = aside.submit(alembic.command.downgrade, db.migration_config(empty_database), "base")
        wait_until(lambda: watcher.scalar(waiting) == 1)
        wait_until(lambda: watcher.scalar(waiting) == 0)
        reader.rollback()
        back.result()
    assert tables(empty_database) == set()


def test_an_index_is_made_without_a_lock_and_anew_after_a_try_that_left_it_unfinished(
    empty_database: str, tmp_path: Path
) -> None:
    """The way of docs/upgrades.md: outside of the transaction that migrations otherwise run in."""
    migrations = tmp_path / "migrations"
    shutil.copytree(db.MIGRATIONS, migrations)
    written = f"""
from alembic import op

revision = "000000000000"
down_revision = {head(empty_database)!r}


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.drop_index("ix_jobs_stage", "jobs", if_exists=True, postgresql_concurrently=True)
        op.create_index("ix_jobs_stage", "jobs", ["stage"], postgresql_concurrently=True)
"""
    (migrations / "versions" / "an_index.py").write_text(written)
    db.upgrade(empty_database)
    config = db.migration_config(empty_database)
    config.set_main_option("script_location", str(migrations))
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("CREATE INDEX ix_jobs_stage ON jobs (id)"))  # what is left
    alembic.command.upgrade(config, "head")
    [made] = [rule for rule in rules(empty_database) if "ix_jobs_stage" in rule]
    assert made[-1].endswith("(stage)")
