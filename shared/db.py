"""The database: engine, sessions and migrations. Sync everywhere; whoever opens a session commits it."""

from pathlib import Path
from typing import TypeAlias

import alembic.command
import alembic.config
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

from shared.config import Database

SessionFactory: TypeAlias = sessionmaker[Session]

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


def create_database_engine(database: Database) -> Engine:
    """An engine whose every wait is bounded: for a pooled connection, a lock, a statement, a dead peer."""
    limits = {
        "statement_timeout": database.statement_timeout_seconds,
        "lock_timeout": database.lock_timeout_seconds,
        "idle_in_transaction_session_timeout": 2 * database.statement_timeout_seconds,
    }
    return create_engine(
        database.url,
        pool_size=database.pool_size,
        max_overflow=0,
        pool_timeout=database.pool_wait_seconds,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 5,
            "keepalives": 1,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "options": " ".join(f"-c {name}={int(seconds * 1000)}" for name, seconds in limits.items()),
        },
    )


def create_session_factory(database: Database) -> SessionFactory:
    """Sessions whose rows stay readable after the commit, since answers are written from them."""
    return sessionmaker(create_database_engine(database), expire_on_commit=False)


def migration_config(database_url: str) -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str, *, revision: str = "head") -> None:
    """Bring the schema to `revision`; safe to run from several processes at once (see `migrations/env.py`)."""
    alembic.command.upgrade(migration_config(database_url), revision)
