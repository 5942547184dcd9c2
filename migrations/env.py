"""Runs migrations one process at a time, and gives up on a busy lock rather than stall the service behind it."""

import time

from alembic import context
from sqlalchemy import create_engine, pool, text

from shared.config import load_settings
from shared.models import Base

ADVISORY_LOCK = 0x6D61736B  # "mask"
TURN_SECONDS = 0.1


def migrate() -> None:
    url = context.config.attributes.get("database_url") or load_settings().database.url
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        # Asked again and again: who waits inside a transaction holds up an index that is made concurrently.
        while not connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": ADVISORY_LOCK}):
            connection.rollback()
            time.sleep(TURN_SECONDS)
        connection.execute(text("SET lock_timeout = '5s'"))
        connection.commit()
        context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
        with context.begin_transaction():
            context.run_migrations()


migrate()
