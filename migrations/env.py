"""Runs migrations one process at a time, and gives up on a busy lock rather than stall the service behind it."""

from alembic import context
from sqlalchemy import create_engine, pool, text

from shared.config import load_settings
from shared.models import Base

ADVISORY_LOCK = 0x6D61736B  # "mask"


def migrate() -> None:
    url = context.config.attributes.get("database_url") or load_settings().database.url
    engine = create_engine(url, poolclass=pool.NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": ADVISORY_LOCK})
        connection.execute(text("SET lock_timeout = '5s'"))
        connection.commit()
        context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True)
        with context.begin_transaction():
            context.run_migrations()


migrate()
