"""Upkeep: `python -m worker.upkeep` puts right, every few seconds, whatever a death or a lost message left behind.

Each chore is idempotent and any number of these processes may run. It needs the database alone: the broker may be
down, and hints are sent when it is back.
"""

import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy import delete, exists, func, or_, select
from sqlalchemy.exc import SQLAlchemyError

from shared import deliveries, lateness, queue
from shared import log as logs
from shared.broker import Hints
from shared.config import Settings, load_settings
from shared.db import SessionFactory, create_session_factory
from shared.errors import MasklineError
from shared.models import DeliveryState, IdempotencyKey, Job, JobState, Step, StepState, Upload, WebhookDelivery, Worker
from shared.storage import Storage, job_prefix

log = structlog.get_logger(__name__)

PURGED_AT_ONCE = 20


@dataclass(frozen=True, kw_only=True)
class Upkeep:
    settings: Settings
    sessions: SessionFactory
    storage: Storage
    hints: Hints

    def chores(self) -> Sequence[Callable[[], None]]:
        return (
            self.reap_lost_steps,
            self.end_late_jobs,
            self.hint_waiting_steps,
            self.hint_due_deliveries,
            self.end_deliveries_of_disabled,
            self.purge_jobs,
            self.purge_uploads,
            self.forget_the_past,
        )

    def reap_lost_steps(self) -> None:
        """Take steps back from workers whose lease ran out."""
        while True:
            with self.sessions.begin() as session:
                step = lateness.reap(session, lost_attempts=self.settings.jobs.lost_attempts)
            if step is None:
                return
            log.warning(
                "a step was taken back from a lost worker", job_id=str(step.job_id), step=step.ordinal,
                attempt=step.attempt, state=step.state, lost=step.lost,
            )  # fmt: skip

    def end_late_jobs(self) -> None:
        for end in (lateness.expire, lateness.time_out):
            while True:
                with self.sessions.begin() as session:
                    job = end(session)
                if job is None:
                    break
                log.warning("a job ran out of time", job_id=str(job.id), state=job.state)

    def hint_waiting_steps(self) -> None:
        """Wake idle workers for steps whose first hint was lost or whose pause is over."""
        with self.sessions.begin() as session:
            due = queue.take_due_hints(session, gone_seconds=self.settings.upkeep.worker_gone_seconds)
        for step_id, queue_name in due:
            self.hints.wake(queue_name, step_id)

    def hint_due_deliveries(self) -> None:
        due = WebhookDelivery.state == DeliveryState.PENDING, WebhookDelivery.next_attempt_at <= func.now()
        with self.sessions() as session:
            if session.scalar(select(exists().where(*due))):
                self.hints.wake_sender()

    def end_deliveries_of_disabled(self) -> None:
        """Give up what is due for endpoints that were disabled; the sender leaves it alone."""
        while True:
            with self.sessions.begin() as session:
                ended = deliveries.end_of_disabled(session)
            if not ended:
                return
            log.info("webhooks of a disabled endpoint were given up", count=ended)

    def purge_jobs(self) -> None:
        """Remove the files, then the row, of jobs deleted or past their retention, once none of their steps runs."""
        running = exists().where(Step.job_id == Job.id, Step.state == StepState.RUNNING)
        over = or_(Job.deleted_at.is_not(None), Job.expires_at < func.now()) & ~running
        with self.sessions() as session:
            rows = list(session.scalars(select(Job).where(over).limit(PURGED_AT_ONCE)))
        for row in rows:
            self.storage.delete_prefix(job_prefix(row.tenant_id, row.id))
            with self.sessions.begin() as session:
                session.execute(delete(Job).where(Job.id == row.id, over))
            log.info("a job was removed with its files", job_id=str(row.id))

    def purge_uploads(self) -> None:
        """Remove uploads past their time that no unfinished job still reads."""
        reading = exists().where(Job.upload_id == Upload.id, Job.state.in_([JobState.QUEUED, JobState.RUNNING]))
        over = (Upload.expires_at < func.now()) & ~reading
        with self.sessions() as session:
            rows = list(session.scalars(select(Upload).where(over).limit(PURGED_AT_ONCE)))
        for row in rows:
            self.storage.delete_prefix(row.storage_key)
            with self.sessions.begin() as session:
                session.execute(delete(Upload).where(Upload.id == row.id, over))

    def forget_the_past(self) -> None:
        """Drop rows of workers long silent, of Idempotency-Keys past their time, of webhooks that ended long ago."""
        gone = func.now() - timedelta(seconds=self.settings.upkeep.worker_gone_seconds)
        with self.sessions.begin() as session:
            session.execute(delete(Worker).where(Worker.heartbeat_at < gone))
            session.execute(delete(IdempotencyKey).where(IdempotencyKey.expires_at < func.now()))
            deliveries.forget(session, keep_seconds=self.settings.webhooks.keep_seconds)

    def run_until(self, stopping: threading.Event) -> None:
        while not stopping.wait(self.settings.upkeep.period_seconds):
            for chore in self.chores():
                try:
                    chore()
                except (SQLAlchemyError, MasklineError) as error:  # the next round tries again
                    log.warning("a chore could not be done", chore=chore.__name__, error=str(error))


def main() -> None:
    settings = load_settings()
    logs.configure(settings)
    stopping = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stopping.set())
    hints = Hints(settings.broker)
    upkeep = Upkeep(
        settings=settings, sessions=create_session_factory(settings.database),
        storage=Storage.from_settings(settings.storage), hints=hints,
    )  # fmt: skip
    log.info("upkeep begins", period_seconds=settings.upkeep.period_seconds)
    upkeep.run_until(stopping)
    hints.close()


if __name__ == "__main__":
    main()
