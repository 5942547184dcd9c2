"""How many jobs are queued, known well enough to refuse more before the system drowns in them."""

import threading
import time

from sqlalchemy import func, select

from api.errors import QueueFull
from shared.db import SessionFactory
from shared.models import Job, JobState

COUNTED_EVERY_SECONDS = 1.0
SHARE_OF_TIME = 0.05  # that counting may take: a million rows take a while, and are counted the more rarely


class Backlog:
    """Counted by the database now and then, and between two counts by what this process let in itself.

    So a refusal costs nothing, and a count never more than a twentieth of one connection. Several processes that let
    jobs in at once may pass the limit by what they take in a few seconds, which is nothing to a limit of its kind.
    """

    def __init__(self, sessions: SessionFactory, *, limit: int) -> None:
        self._sessions = sessions
        self._limit = limit
        self._counting = threading.Lock()
        self._changing = threading.Lock()  # guards what follows
        self._queued = 0
        self._count_at = 0.0

    def admit(self, jobs: int) -> None:
        """Raises QueueFull when the queue has no room for so many more."""
        self._keep_counted()
        with self._changing:
            if self._queued + jobs > self._limit:
                raise QueueFull(f"{self._queued} of at most {self._limit} jobs are queued: no room for {jobs} more now")
            self._queued += jobs

    def _keep_counted(self) -> None:
        if time.monotonic() < self._count_at or not self._counting.acquire(blocking=False):
            return
        try:
            began = time.monotonic()
            found = select(Job.id).where(Job.state == JobState.QUEUED).limit(self._limit + 1)
            with self._sessions.autocommit() as session:
                queued = session.scalars(select(func.count()).select_from(found.subquery())).one()
            ended = time.monotonic()
            with self._changing:
                self._queued = queued
                self._count_at = ended + max(COUNTED_EVERY_SECONDS, (ended - began) / SHARE_OF_TIME)
        finally:
            self._counting.release()
