"""The runner on real servers: one fenced end for every step, whatever happens while its model runs."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

import pytest
from sqlalchemy import delete, select, text

from shared import lateness, lifecycle
from shared.broker import Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Job, JobState, StepState, WebhookDelivery, Worker
from shared.storage import Storage, StoredObject
from tests.integration.conftest import (
    Broker,
    MakeJob,
    Submit,
    Take,
    changed,
    count_rows,
    nothing_stored,
    read_job,
    read_only,
    read_steps,
    small_image,
    told,
    wait_until,
)
from tests.integration.takeover import take_over, wait_for_a_beat
from tests.integration.workbench import Workbench

# --- success -------------------------------------------------------------------------------------------------------


class WatchedStorage(Storage):
    """The real one, which tells what it has just stored."""

    tell: Callable[[str], None]

    def put(self, key: str, body: bytes | BinaryIO, *, content_type: str) -> StoredObject:
        stored = super().put(key, body, content_type=content_type)
        self.tell(key.rsplit("/", 1)[-1])
        return stored


@pytest.fixture
def watched(settings: Settings) -> WatchedStorage:
    return WatchedStorage.from_settings(settings.storage)


def test_the_manifest_is_stored_last_and_only_then_the_job_has_succeeded(
    workbench: Workbench, watched: WatchedStorage, sessions: SessionFactory, job: Job
) -> None:
    noted: list[tuple[str, JobState]] = []
    watched.tell = lambda name: noted.append((name, read_job(sessions, job).state))
    replace(workbench, storage=watched).run()
    assert noted == [("mask.png", JobState.RUNNING), ("manifest.json", JobState.RUNNING)]
    finished = read_job(sessions, job)
    assert finished.state == JobState.SUCCEEDED
    assert str(finished.manifest_key).endswith("/attempts/1/manifest.json")


def test_mode_and_input_size_reach_the_model(submit: Submit, workbench: Workbench) -> None:
    submit(file=small_image(width=50, height=40), options={"input_size": 96})
    assert workbench.run().asked == [((40, 50, 3), "demo", 96)]


def test_one_wake_runs_all_that_is_queued(submit: Submit, workbench: Workbench, sessions: SessionFactory) -> None:
    for _ in range(3):
        submit()
    assert len(workbench.run().asked) == 3
    assert len(workbench.run().asked) == 0
    with sessions() as session:
        assert set(session.scalars(select(Job.state))) == {JobState.SUCCEEDED}


def test_the_sender_of_webhooks_is_woken_at_the_end(
    workbench: Workbench, hints: Hints, broker: Broker, job: Job
) -> None:
    workbench.run()
    hints.close()
    assert broker.senders() == 1


def test_a_worker_shows_what_it_does_and_what_it_holds(
    workbench: Workbench, sessions: SessionFactory, job: Job
) -> None:
    seen: list[Worker] = []
    workbench.run(lambda: seen.append(read_only(sessions, Worker)))
    assert seen[0].step_id == read_steps(sessions, job)[0].id
    after = read_only(sessions, Worker)
    assert (after.step_id, after.mode_loaded) == (None, "demo")


def test_nothing_starves_for_its_low_priority(
    workbench: Workbench, storage: Storage, sessions: SessionFactory, make_job: MakeJob
) -> None:
    starving = make_job(priority=-100)
    for _ in range(20):
        make_job(priority=100)
    workbench.run()  # none has a source; each fails at once
    with sessions() as session:
        order = list(session.scalars(select(Job.id).order_by(Job.started_at)))
    assert order.index(starving.id) < 16


# --- asked to stop -------------------------------------------------------------------------------------------------


def test_a_job_canceled_while_it_runs_stops_and_stores_nothing(
    workbench: Workbench, storage: Storage, sessions: SessionFactory, job: Job
) -> None:
    def cancel() -> None:
        with sessions.begin() as session:
            lifecycle.request_cancel(session, job.id)
        wait_for_a_beat(sessions)

    workbench.run(cancel)
    assert read_job(sessions, job).state == JobState.CANCELED
    assert nothing_stored(storage, job)
    assert told(sessions, "attempt") == ["started", "canceled"]


def test_a_cancel_that_comes_last_still_has_its_way(
    workbench: Workbench, sessions: SessionFactory, settings: Settings, job: Job
) -> None:
    """After the last look and before the publication: exactly one of the two may win."""

    def cancel() -> None:
        with sessions.begin() as session:
            lifecycle.request_cancel(session, job.id)

    slow_heart = changed(settings, "worker", heartbeat_seconds=60)
    replace(workbench, settings=slow_heart).run(cancel)
    ended = read_job(sessions, job)
    assert (ended.state, ended.manifest_key) == (JobState.CANCELED, None)
    assert read_only(sessions, WebhookDelivery).type == "job.canceled"


def test_a_draining_worker_gives_its_step_back_and_takes_no_other(
    submit: Submit, workbench: Workbench, storage: Storage, sessions: SessionFactory, job: Job
) -> None:
    submit()
    draining = threading.Event()
    engine = workbench.run(draining.set, draining=draining)
    [step] = read_steps(sessions, job)
    assert (step.state, step.attempt, step.lost, step.failures) == (StepState.QUEUED, 1, 0, 0)
    assert nothing_stored(storage, job)
    assert len(engine.asked) == 1
    workbench.run()
    assert read_job(sessions, job).state == JobState.SUCCEEDED


def test_a_job_that_timed_out_and_was_deleted_stops_and_the_next_one_runs(
    submit: Submit, workbench: Workbench, storage: Storage, sessions: SessionFactory, job: Job
) -> None:
    ran: list[bool] = []

    def time_out() -> None:
        ran.append(True)
        if len(ran) > 1:
            return
        with sessions.begin() as session:
            late = "UPDATE jobs SET stop_by = now() - interval '1 second' WHERE id = :id"
            session.execute(text(late), {"id": job.id})  # the other one runs already, and is in time
            assert lateness.time_out(session) is not None
            lifecycle.delete_job(session, job.id)
        wait_for_a_beat(sessions)

    submit()
    workbench.run(time_out)
    assert [step.state for step in read_steps(sessions, job)] == [StepState.CANCELED]
    assert nothing_stored(storage, job)
    assert len(ran) == 2


# --- leases --------------------------------------------------------------------------------------------------------


def test_a_worker_whose_step_was_taken_over_writes_nothing(
    workbench: Workbench, sessions: SessionFactory, take: Take, job: Job
) -> None:
    workbench.run(lambda: take_over(sessions, take, job))
    [step] = read_steps(sessions, job)
    assert (step.state, step.attempt) == (StepState.RUNNING, 2)
    current = read_job(sessions, job)
    assert (current.state, current.manifest_key) == (JobState.RUNNING, None)
    assert told(sessions, "attempt") == ["started", "lost", "started"]
    assert count_rows(sessions, WebhookDelivery) == 0


def test_a_worker_that_hears_of_it_in_time_stores_nothing_either(
    workbench: Workbench, storage: Storage, sessions: SessionFactory, take: Take, job: Job
) -> None:
    def lose() -> None:
        take_over(sessions, take, job)
        wait_for_a_beat(sessions)

    workbench.run(lose)
    assert nothing_stored(storage, job)


def test_a_step_that_was_lost_while_its_files_were_stored_gets_no_manifest(
    workbench: Workbench, watched: WatchedStorage, sessions: SessionFactory, take: Take, job: Job
) -> None:
    stored: list[str] = []

    def lose(name: str) -> None:
        stored.append(name)
        take_over(sessions, take, job)
        wait_for_a_beat(sessions)

    watched.tell = lose
    replace(workbench, storage=watched).run()
    assert stored == ["mask.png"]


def test_the_lease_lasts_as_long_as_the_work(
    workbench: Workbench, settings: Settings, sessions: SessionFactory, job: Job
) -> None:
    def work_long() -> None:
        time.sleep(settings.worker.lease_seconds + 0.5)
        with sessions.begin() as session:
            assert lateness.reap(session, lost_attempts=3) is None

    workbench.run(work_long)
    assert (read_job(sessions, job).state, read_job(sessions, job).attempts) == (JobState.SUCCEEDED, 1)


def test_a_worker_that_cannot_renew_its_lease_leaves_the_step_by_itself(
    workbench: Workbench, settings: Settings, storage: Storage, sessions: SessionFactory, job: Job
) -> None:
    """By its own clock: nobody has told it that the lease is lost."""
    short = changed(settings, "worker", lease_seconds=1, heartbeat_seconds=0.2)

    def hold_the_row() -> None:
        with sessions() as session:
            session.execute(text("SELECT 1 FROM steps FOR UPDATE"))
            time.sleep(1.5)

    replace(workbench, settings=short).run(hold_the_row)
    assert read_steps(sessions, job)[0].state == StepState.RUNNING
    assert nothing_stored(storage, job)


def test_a_worker_that_was_forgotten_enters_itself_again(workbench: Workbench, sessions: SessionFactory) -> None:
    with workbench.runner():
        before = read_only(sessions, Worker)
        with sessions.begin() as session:
            session.execute(delete(Worker))
        wait_until(lambda: count_rows(sessions, Worker))
        again = read_only(sessions, Worker)
    assert (again.id, again.host, again.modes) == (before.id, before.host, before.modes)
