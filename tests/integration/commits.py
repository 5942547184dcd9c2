"""Commits that fail, or succeed and cannot say so: the database cuts the connection before, or after."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import psycopg
from sqlalchemy import Connection, event, text
from sqlalchemy.orm import Session

from shared.db import SessionFactory


@contextmanager
def watched_commits(sessions: SessionFactory, hit: Callable[[Connection], bool]) -> Iterator[None]:
    """`hit` is asked before every commit; where it says so, the database cuts the connection and the commit fails."""
    engine = sessions.engine

    def watch(connection: Connection) -> None:
        if hit(connection):
            pid = connection.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
            with Session(engine) as session:
                session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    event.listen(engine, "commit", watch)
    try:
        yield
    finally:
        event.remove(engine, "commit", watch)


def commit(connection: Connection) -> None:
    """Behind the back of whoever is about to, whose own commit then has something to lose as well."""
    driver = cast("psycopg.Connection", connection.connection.dbapi_connection)
    driver.commit()
    driver.execute("SELECT 1")
