"""Telling how far steps are, beside the work: a trip to the database may take as long as decoding an image.

What a step says is written in its order by a thread of its own, the latest of each stage, and before the step ends.
"""

import threading
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


@dataclass(frozen=True, kw_only=True)
class Report:
    hold: Hold
    stage: str
    done: int
    """Frames."""
    total: int | None


class Teller:
    def __init__(self, sessions: SessionFactory) -> None:
        self._sessions = sessions
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="teller")
        self._changed = threading.Condition()  # guards what follows
        self._waiting: dict[tuple[Hold, str], Report] = {}
        self._telling: Report | None = None

    def tell(self, report: Report) -> None:
        """Raises as `hold.check` does. What is heard in return, the next check raises."""
        report.hold.check()
        with self._changed:
            is_new = (report.hold, report.stage) not in self._waiting
            self._waiting[report.hold, report.stage] = report
        if is_new:
            self._pool.submit(self._tell_next)

    def settle(self, hold: Hold) -> None:
        """Wait until all that the step has said is written, or could not be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._has_to_tell(hold))

    def _has_to_tell(self, hold: Hold) -> bool:
        telling = [self._telling] if self._telling else []
        return any(each.hold is hold for each in [*telling, *self._waiting.values()])

    def _tell_next(self) -> None:
        with self._changed:
            self._telling = report = self._waiting.pop(next(iter(self._waiting)))
        try:
            report.hold.hear(partial(self._write, report))
        except SQLAlchemyError as error:  # no reason to lose the work
            log.warning("progress could not be told", stage=report.stage, error=type(error).__name__)
        except Exception:
            log.exception("progress could not be told", stage=report.stage)
        with self._changed:
            self._telling = None
            self._changed.notify_all()

    def _write(self, report: Report) -> Orders:
        with self._sessions.begin() as session:
            return lifecycle.report_progress(
                session, report.hold.lease, stage=report.stage, done=report.done, total=report.total
            )
