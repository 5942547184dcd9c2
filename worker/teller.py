"""Telling how far steps are, beside the work and only where there is time to look: a trip to the database may take as
long as decoding an image, and as long as storing its mask.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import structlog
from sqlalchemy.exc import SQLAlchemyError

from shared import lifecycle
from shared.db import SessionFactory
from shared.lifecycle import Orders
from worker.heart import Hold

log = structlog.get_logger(__name__)

WORTH_TELLING_SECONDS = 0.1  # of a stage: what is over before has no reader


@dataclass(frozen=True, kw_only=True)
class Report:
    hold: Hold
    stage: str
    done: int
    """Frames."""
    total: int | None


class Teller:
    """Writes what steps say in its order, the latest of each stage. Nothing is told of a step that has ended."""

    def __init__(self, sessions: SessionFactory) -> None:
        self._sessions = sessions
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teller")
        self._changed = threading.Condition()  # guards what follows
        self._waiting: dict[tuple[Hold, str], tuple[float, Report]] = {}
        """With the time from which on each is told."""
        self._telling: Report | None = None
        self._is_busy = False

    def tell(self, report: Report) -> None:
        """Raises as `hold.check` does. What is heard in return, the next check raises."""
        report.hold.check()
        with self._changed:
            key = report.hold, report.stage
            due, _ = self._waiting.get(key, (time.monotonic() + WORTH_TELLING_SECONDS, report))
            self._waiting[key] = due, report
            if not self._is_busy:
                self._is_busy = True
                self._pool.submit(self._tell_waiting)

    def settle(self, hold: Hold) -> None:
        """Nothing is told of this step from now on: what has not begun is dropped, and what has is waited for."""
        with self._changed:
            for key in [key for key in self._waiting if key[0] is hold]:
                del self._waiting[key]
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._telling is None or self._telling.hold is not hold)

    def _tell_waiting(self) -> None:
        while (report := self._take_due()) is not None:
            try:
                report.hold.hear(partial(self._write, report))
            except SQLAlchemyError as error:  # no reason to lose the work
                log.warning("progress could not be told", stage=report.stage, error=type(error).__name__)
            except Exception:
                log.exception("progress could not be told", stage=report.stage)
            with self._changed:
                self._telling = None
                self._changed.notify_all()

    def _take_due(self) -> Report | None:
        """The next report, once it is worth telling; None when there is none."""
        with self._changed:
            while self._waiting:
                key, (due, report) = next(iter(self._waiting.items()))
                left = due - time.monotonic()
                if left <= 0:
                    del self._waiting[key]
                    self._telling = report
                    return report
                self._changed.wait(left)
            self._is_busy = False
            return None

    def _write(self, report: Report) -> Orders:
        with self._sessions.begin() as session:
            return lifecycle.report_progress(
                session, report.hold.lease, stage=report.stage, done=report.done, total=report.total
            )
