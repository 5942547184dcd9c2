"""Claims and lists where there are many rows: databases with a thousand jobs, and with a million, take turns."""

import random
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import make_url, select, text

from api.backlog import Backlog
from api.deps import Resources
from api.pages import next_cursor
from api.routes.jobs import list_jobs
from bench._system import System
from bench.webhooks import percentile
from shared import db, lifecycle
from shared.broker import GPU, Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Job, JobState, Tenant
from shared.storage import Storage
from shared.tenants import Caller

MODES = ("demo", "fast", "balanced", "accurate", "sota")
WARM_UP = 20
TENANTS = 20  # the largest of them has a third of all jobs
OLDEST_FIRST_EVERY = 16  # as workers do

_FILL = (
    "INSERT INTO tenants (id, name, webhook_secret)"
    " SELECT gen_random_uuid(), 'tenant ' || number, '-' FROM generate_series(1, :tenants) number",
    """
    INSERT INTO jobs (id, tenant_id, state, kind, mode, options, metadata, priority, source, created_at, queued_at,
        start_by, start_deadline_seconds, run_timeout_seconds, keep_seconds)
    SELECT uuidv7(age), owner.id, 'queued', 'image', (CAST(:modes AS text[]))[1 + floor(5 * random() ^ 2)::int],
        '{}', '{}', (ARRAY[-10, -10, -10, 0, 0, 5])[1 + floor(6 * random())::int],
        '{"size_bytes": 100000, "filename": "a.png"}',
        now() + age, now() + age, now() + interval '1 day', 86400, 21600, 2592000
    FROM (SELECT (number - CAST(:rows AS int)) * interval '1 second' AS age,
              floor(CAST(:tenants AS int) * random() ^ 3)::int AS place
          FROM generate_series(1, :rows) number) drawn
    JOIN (SELECT id, row_number() OVER () - 1 AS place FROM tenants) owner USING (place)
    """,
    """
    INSERT INTO steps (id, job_id, tenant_id, ordinal, kind, queue, mode, priority, state)
    SELECT id, id, tenant_id, 0, 'infer', 'gpu', mode, priority, 'queued' FROM jobs
    """,
)


@dataclass(frozen=True)
class Filled:
    """A database with so many queued jobs."""

    rows: int
    resources: Resources
    tenant: Caller
    """The one with the most jobs."""
    middle: str
    """A cursor halfway through its jobs."""

    def claim(self, number: int) -> float:
        began = time.perf_counter()
        with self.resources.sessions.begin() as session:
            claimed = lifecycle.claim(
                session, worker_id=uuid.uuid4(), queue_name=GPU, modes=MODES, mode_loaded=random.choice(MODES),
                lease_seconds=600, oldest_first=number % OLDEST_FIRST_EVERY == 0,
            )  # fmt: skip
        assert claimed is not None
        return 1000 * (time.perf_counter() - began)

    def list(self, number: int) -> float:
        """One page of fifty: the newest, further down, or of a state or mode, which may have no job at all."""
        cases: list[dict[str, Any]] = [
            {}, {"cursor": self.middle}, {"state": JobState.QUEUED}, {"state": JobState.FAILED},
            {"state": JobState.RUNNING}, {"mode": "sota"}, {"kind": "image", "mode": "demo"},
        ]  # fmt: skip
        wanted = {"limit": 50, "cursor": None, **cases[number % len(cases)]}
        began = time.perf_counter()
        list_jobs(self.resources, self.tenant, **wanted)
        return 1000 * (time.perf_counter() - began)


def measure(system: System, sizes: Sequence[int], *, repeats: int, turns: int) -> dict[str, Any]:
    """Milliseconds by the number of rows; each claim and each page a transaction of its own."""
    told: dict[str, Any] = {}
    with ExitStack() as opened:
        databases = [opened.enter_context(fill(system, rows)) for rows in sizes]
        for name in ("claim", "list"):
            times: dict[int, list[float]] = {rows: [] for rows in sizes}
            for turn in range(turns + 1):
                for database in databases:
                    act = getattr(database, name)
                    made = [act(number) for number in range(repeats if turn else WARM_UP)]
                    times[database.rows] += made if turn else []
            for rows, each in times.items():
                told |= {f"{name}_p{rank}_ms_{_spell(rows)}": round(percentile(each, rank), 2) for rank in (50, 99)}
            few = told[f"{name}_p99_ms_{_spell(sizes[0])}"]
            for rows in sizes[1:]:
                many = told[f"{name}_p99_ms_{_spell(rows)}"]
                told[f"{name}_p99_ratio_{_spell(rows)}_to_{_spell(sizes[0])}"] = round(many / few, 3)
    return told


@contextmanager
def fill(system: System, rows: int) -> Iterator[Filled]:
    server = make_url(system.settings.database.url)
    name = f"rows_{rows}"
    _execute(server.render_as_string(hide_password=False), f"CREATE DATABASE {name}")
    url = server.set(database=name).render_as_string(hide_password=False)
    db.upgrade(url)
    unbound = system.settings.database.model_copy(update={"url": url, "statement_timeout_seconds": 3600.0})
    filling = db.SessionFactory(unbound)
    with filling.begin() as session:
        for statement in _FILL:
            session.execute(text(statement), {"rows": rows, "tenants": TENANTS, "modes": list(MODES)})
    filling.dispose()
    _execute(url, "VACUUM ANALYZE")
    settings = system.settings.model_copy(update={"database": system.settings.database.model_copy(update={"url": url})})
    sessions = db.SessionFactory(settings.database)
    try:
        yield _look_into(settings, sessions, rows)
    finally:
        sessions.dispose()
        _execute(server.render_as_string(hide_password=False), f"DROP DATABASE {name} WITH (FORCE)")


def _look_into(settings: Settings, sessions: SessionFactory, rows: int) -> Filled:
    with sessions() as session:
        most = "SELECT tenant_id FROM jobs GROUP BY tenant_id ORDER BY count(*) DESC LIMIT 1"
        row = session.get_one(Tenant, session.scalar(text(most)))
        newest = select(Job).where(Job.tenant_id == row.id).order_by(Job.created_at.desc(), Job.id.desc())
        half = list(session.scalars(newest.offset(rows // 10).limit(2)))
    hints = Hints(settings.broker)
    hints.close()
    resources = Resources(
        settings=settings, sessions=sessions, storage=Storage.from_settings(settings.storage), hints=hints,
        backlog=Backlog(sessions, limit=settings.jobs.queued_limit),
    )  # fmt: skip
    tenant = Caller(id=row.id, name=row.name, keep_results_seconds=None, keep_sources_seconds=None)
    return Filled(rows, resources, tenant, next_cursor(half, limit=1) or "")


def _execute(url: str, statement: str) -> None:
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(statement.encode())


def _spell(rows: int) -> str:
    """1k, 100k, 1m."""
    return f"{rows // 1_000_000}m" if rows >= 1_000_000 else f"{rows // 1000}k" if rows >= 1000 else str(rows)
