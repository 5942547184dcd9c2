"""The database: engine, sessions and migrations. Sync everywhere; whoever opens a session commits it."""

import select
from pathlib import Path
from typing import Any, TypeVar

import alembic.command
import alembic.config
import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.orm import Session, sessionmaker

from shared.config import Database

Answer = TypeVar("Answer")

SILENT_SECONDS = 5  # beyond the statement timeout, by when a server that is well has answered one way or the other
MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


class BoundedConnection(psycopg.Connection[Any]):
    """Gives up a server that took a question and then hangs; its own timeouts hang with it, and TCP sees nothing."""

    answer_seconds: float | None = None

    def wait(self, gen: PQGen[Answer], interval: float = 0.1, timeout: float | None = None) -> Answer:
        try:
            return super().wait(gen, interval=interval, timeout=self.answer_seconds if timeout is None else timeout)
        except psycopg.OperationalError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()  # or a late answer would be taken for that to another question
            raise


class SessionFactory(sessionmaker[Session]):
    """Sessions whose rows stay readable after the commit, since answers are written from them.

    Those of single statements have connections of their own, up to `pool_size` as well: changing one's mode and back
    again takes longer than many a statement.
    """

    def __init__(self, database: Database) -> None:
        self.engine = create_database_engine(database)
        self._single = create_database_engine(database, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
        super().__init__(self.engine, expire_on_commit=False)

    def autocommit(self) -> Session:
        """A session whose every statement is a transaction of its own: one around it is two more trips."""
        return self(bind=self._single)

    def dispose(self) -> None:
        self.engine.dispose()
        self._single.dispose()


def create_database_engine(database: Database, **options: Any) -> Engine:
    """An engine whose every wait is bounded: for a pooled connection, a lock, a statement, a dead peer.

    `options` are those of SQLAlchemy's engines.
    """
    limits = {
        "statement_timeout": database.statement_timeout_seconds,
        "lock_timeout": database.lock_timeout_seconds,
        "idle_in_transaction_session_timeout": 2 * database.statement_timeout_seconds,
    }
    bounds = [f"-c {name}={int(seconds * 1000)}" for name, seconds in limits.items()]
    bounds.append("-c jit=off")  # compiling takes longer than any of these statements runs
    engine = create_engine(
        database.url,
        pool_size=database.pool_size,
        max_overflow=0,
        pool_timeout=database.pool_wait_seconds,
        connect_args={
            "connect_timeout": 5,
            "keepalives": 1,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "options": " ".join(bounds),
        },
        **options,
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: list[Any], named: dict[str, Any]) -> BoundedConnection:
        connection = BoundedConnection.connect(*arguments, **named)
        connection.answer_seconds = database.statement_timeout_seconds + SILENT_SECONDS
        return connection

    event.listen(engine, "checkout", _refuse_cut)
    return engine


def _refuse_cut(connection: psycopg.Connection[Any], _record: Any, _proxy: Any) -> None:
    """Nobody is asked anything, so whatever there is to read in a pooled connection is its end: the pool replaces it.

    To ask whether it still answers, as `pool_pre_ping` does, would be a trip to the database for every request.
    """
    line = select.poll()
    if not connection.closed:
        line.register(connection.fileno(), select.POLLIN)
    if connection.closed or line.poll(0):
        raise DisconnectionError("the connection was cut")


def migration_config(database_url: str) -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str, *, revision: str = "head") -> None:
    """Bring the schema to `revision`; safe to run from several processes at once (see `migrations/env.py`)."""
    alembic.command.upgrade(migration_config(database_url), revision)
