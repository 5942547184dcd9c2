"""Upkeep: `python -m worker.upkeep` puts right, every few seconds, whatever a death or a lost message left behind.

Each chore is idempotent and any number of these processes may run. It needs the database alone: the broker may be
down, and hints are sent when it is back. Beside it, in the same process, run what needs the storage as well:
`worker/housekeeping.py` and `worker/sweep.py`.
"""

import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
from sqlalchemy import exists, func, select
from sqlalchemy.exc import SQLAlchemyError

from shared import deliveries, faults, lateness, queue
from shared import log as logs
from shared.broker import Hints
from shared.config import Settings, load_settings
from shared.db import SessionFactory
from shared.errors import MasklineError
from shared.models import DeliveryState, WebhookDelivery
from shared.storage import Storage
from worker.housekeeping import Housekeeping
from worker.sweep import Sweep

log = structlog.get_logger(__name__)

SOON_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Upkeep:
    settings: Settings
    sessions: SessionFactory
    hints: Hints

    def chores(self) -> Sequence[Callable[[], None]]:
        return (
            self.reap_lost_steps,
            self.end_late_jobs,
            self.hint_waiting_steps,
            self.hint_due_deliveries,
            self.end_deliveries_of_disabled,
        )

    def rest_seconds(self) -> float:
        """Until the next round: a period, or less when a lease runs out before, whose step waits for nothing else."""
        period = self.settings.upkeep.period_seconds
        try:
            with self.sessions() as session:
                left = lateness.find_lease_end(session)
        except SQLAlchemyError:  # as the chores have told
            return period
        return period if left is None else min(period, max(left, 0) + SOON_SECONDS)

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


def run_until(
    stopping: threading.Event, chores: Sequence[Callable[[], None]], *, rest_seconds: Callable[[], float]
) -> None:
    """Each chore in turn, again and again; one that fails, however it does, is tried again in the next round."""
    while not stopping.wait(rest_seconds()):
        for chore in chores:
            try:
                chore()
            except (SQLAlchemyError, MasklineError) as error:
                log.warning("a chore could not be done", chore=chore.__name__, error=str(error))
            except Exception:  # the others have nothing to do with it
                log.exception("a chore met an error nobody expected", chore=chore.__name__)


def main() -> None:
    settings = load_settings()
    logs.configure(settings)
    stopping = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stopping.set())
    faults.prepare(settings.faults_folder)
    hints = Hints(settings.broker)
    sessions, storage = SessionFactory(settings.database), Storage.from_settings(settings.storage)
    upkeep = Upkeep(settings=settings, sessions=sessions, hints=hints)
    housekeeping = Housekeeping(settings=settings, sessions=sessions, storage=storage, stopping=stopping)
    sweep = Sweep(settings=settings, sessions=sessions, storage=storage, stopping=stopping)
    log.info("upkeep begins", period_seconds=settings.upkeep.period_seconds)
    # What waits for the storage keeps no lost step waiting.
    aside = partial(run_until, stopping, rest_seconds=lambda: settings.upkeep.period_seconds)
    beside = [threading.Thread(target=aside, args=(each.chores(),)) for each in (housekeeping, sweep)]
    for thread in beside:
        thread.start()
    run_until(stopping, upkeep.chores(), rest_seconds=upkeep.rest_seconds)
    for thread in beside:
        thread.join()
    hints.close()


if __name__ == "__main__":
    main()
