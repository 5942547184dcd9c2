"""Runs migrations one process at a time, each in a transaction of its own.

A statement that waits for a table in use has everybody queue behind it who comes later. So it waits for a moment only,
lets them through, and tries again; after TRIES it gives up, with the migrations before kept.
"""

import random
import time

from alembic import context
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, create_engine, pool, text
from sqlalchemy.exc import OperationalError

from shared.config import load_settings
from shared.models import Base

ADVISORY_LOCK = 0x6D61736B  # "mask"
LOCK_SECONDS = 1  # for which the service may stall
PAUSE_SECONDS = 1.0
TRIES = 5
TURN_SECONDS = 0.1


def migrate() -> None:
    url = context.config.attributes.get("database_url") or load_settings().database.url
    limit = f"-c lock_timeout={LOCK_SECONDS}s"  # of the connection, so that a migration may set another and RESET it
    engine = create_engine(url, poolclass=pool.NullPool, connect_args={"options": limit})
    with engine.connect() as connection:
        # Asked again and again: who waits inside a transaction holds up an index that is made concurrently.
        while not connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": ADVISORY_LOCK}):
            connection.rollback()
            time.sleep(TURN_SECONDS)
        connection.commit()
        for tries_left in reversed(range(TRIES)):
            try:
                run(connection)
                return
            except OperationalError as error:
                if not isinstance(error.orig, LockNotAvailable) or not tries_left:
                    raise
                connection.rollback()
                time.sleep(PAUSE_SECONDS * (1 + random.random()))  # noqa: S311 - spreads load, hides nothing


def run(connection: Connection) -> None:
    context.configure(
        connection=connection, target_metadata=Base.metadata, compare_type=True, transaction_per_migration=True
    )
    with context.begin_transaction():
        context.run_migrations()


migrate()
