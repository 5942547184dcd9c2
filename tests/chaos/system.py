"""The stack as chaos sees it: over HTTP as a customer, and with an eye on the database that may be away."""

import time
from typing import Any

import httpx2
import psycopg
from sqlalchemy import make_url, select

from cli.local.stack import Stack
from shared import config
from shared.db import SessionFactory
from shared.models import Tenant
from shared.storage import Storage
from worker.sweep import Sweep

AWAY_SECONDS = 60
PAUSE_SECONDS = 0.05


class System:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.headers = {"Authorization": f"Bearer {stack.api_key}"}
        url = make_url(stack.environment()["MASKLINE_DATABASE__URL"]).set(drivername="postgresql")
        self._database = url.render_as_string(hide_password=False)

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.stack.url, headers=self.headers, timeout=20)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Again and again while the database is away."""
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                with psycopg.connect(self._database, autocommit=True, connect_timeout=3) as connection:
                    return connection.execute(statement.encode()).fetchall()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(PAUSE_SECONDS)

    def storage(self) -> Storage:
        return Storage.from_settings(self._storage())

    def sweep(self) -> None:
        """As upkeep does every few hours, with no grace: whatever nothing names goes at once."""
        database = config.Database(url=self.stack.environment()["MASKLINE_DATABASE__URL"])
        no_grace = config.Upkeep().model_copy(update={"sweep_grace_seconds": -1.0, "sweep_seconds": 0.001})
        settings = config.Settings(database=database, storage=self._storage(), upkeep=no_grace)
        sessions = SessionFactory(database)
        sweep = Sweep(settings=settings, sessions=sessions, storage=self.storage())
        with sessions() as session:
            tenants = session.scalars(select(Tenant)).all()
        for each in tenants:
            sweep.sweep_tenant(each)
        sessions.dispose()

    def _storage(self) -> config.Storage:
        prefix = "MASKLINE_STORAGE__"
        given = {
            name.removeprefix(prefix).lower(): value
            for name, value in self.stack.environment().items()
            if name.startswith(prefix) and not name.endswith("SOURCES")
        }
        return config.Storage.model_validate(given)
