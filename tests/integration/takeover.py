"""A worker's step taken from it while it runs, and the moment from which on the worker cannot but know."""

from datetime import datetime
from functools import partial

from sqlalchemy import func, select, text

from shared import lateness
from shared.db import SessionFactory
from shared.models import Job, Worker
from tests.integration.conftest import Take, wait_until


def take_back(sessions: SessionFactory, job: Job) -> None:
    """As upkeep does from a worker that seems dead."""
    with sessions.begin() as session:
        late = "UPDATE steps SET lease_expires_at = now() - interval '1s' WHERE job_id = :id AND state = 'running'"
        session.execute(text(late), {"id": job.id})
        assert lateness.reap(session, lost_attempts=3) is not None


def take_over(sessions: SessionFactory, take: Take, job: Job) -> None:
    """As upkeep and another worker do."""
    take_back(sessions, job)
    assert take().job.id == job.id


def wait_for_a_beat(sessions: SessionFactory) -> None:
    """Until the worker's heart has beaten, from start to end, after this was called."""
    for _ in range(2):  # the first may have begun before
        with sessions() as session:
            asked_at = session.scalars(select(func.clock_timestamp())).one()
        wait_until(partial(has_beaten, sessions, since=asked_at))


def has_beaten(sessions: SessionFactory, *, since: datetime) -> bool:
    with sessions() as session:
        return session.scalar(select(Worker.id).where(Worker.heartbeat_at > since)) is not None
