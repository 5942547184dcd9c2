"""Orders that are not obeyed: a step that hangs does not keep its worker for ever."""

import os
import signal
import threading
from collections.abc import Callable

from shared import db, lifecycle
from shared.config import Settings
from shared.db import SessionFactory
from shared.lifecycle import ClaimedStep
from shared.models import JobState, Step
from tests.integration.conftest import MakeJob, add_worker, read_job, read_only, wait_until
from tests.integration.processes import bury, fork
from worker.heart import Heart
from worker.relief import take_back

Claim = Callable[..., ClaimedStep]


def test_a_process_that_does_not_stop_when_it_is_told_to_is_ended(
    settings: Settings, sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job, worker = make_job(), add_worker(sessions)
    lease = claim(worker_id=worker.id).lease
    claimed_until = read_only(sessions, Step).lease_expires_at

    def hang() -> None:
        heart = Heart(
            db.SessionFactory(settings.database), worker=worker, draining=threading.Event(),
            beat_seconds=0.05, lease_seconds=60, obey_seconds=0.2,
        )  # fmt: skip
        with heart.hold(lease):
            signal.pause()

    hanging = fork(hang)
    try:
        wait_until(lambda: read_only(sessions, Step).lease_expires_at != claimed_until)  # its heart beats
        with sessions.begin() as session:
            lifecycle.request_cancel(session, job.id)
        assert os.waitstatus_to_exitcode(os.waitpid(hanging, 0)[1]) == -signal.SIGKILL
    except BaseException:
        bury(hanging)
        raise
    take_back(sessions, worker.id, lost_attempts=3)
    assert read_job(sessions, job).state == JobState.CANCELED
