"""Upkeep: each chore puts right what a death or a lost message left behind, and doing it again changes nothing."""

import threading

import pytest
from sqlalchemy import text

from shared import lifecycle
from shared.db import SessionFactory
from shared.errors import StorageUnavailable
from shared.models import JobState, StepState
from tests.integration.conftest import (
    BAD_MEDIA,
    Broker,
    MakeJob,
    Take,
    add_worker,
    make_late,
    read_job,
    read_steps,
    told,
    twice,
)
from worker.upkeep import Upkeep, run_until

# --- jobs and steps ------------------------------------------------------------------------------------------------


def test_a_lost_step_is_queued_again_once_and_the_event_says_so(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, take: Take
) -> None:
    job = make_job()
    take()
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
    twice(upkeep.reap_lost_steps)
    [step] = read_steps(sessions, job)
    assert (step.state, step.lost) == (StepState.QUEUED, 1)
    assert told(sessions, "attempt") == ["started", "lost"]


def test_all_lost_steps_are_taken_back_at_once(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, take: Take
) -> None:
    jobs = [make_job() for _ in range(3)]
    for _ in jobs:
        take()
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
    upkeep.reap_lost_steps()
    assert [step.state for job in jobs for step in read_steps(sessions, job)] == ["queued"] * 3


def test_several_reapers_take_a_step_back_once(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, take: Take
) -> None:
    jobs = [make_job() for _ in range(5)]
    for _ in jobs:
        take()
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
    reaping = [threading.Thread(target=upkeep.reap_lost_steps) for _ in range(4)]
    for each in reaping:
        each.start()
    for each in reaping:
        each.join()
    assert [step.lost for job in jobs for step in read_steps(sessions, job)] == [1] * 5


def test_a_step_that_outlived_its_deleted_job_is_taken_back(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, take: Take
) -> None:
    """Its job failed for another step's sake and was deleted while this one still ran."""
    job = make_job(steps=2)
    failing, _running = take(), take()
    with sessions.begin() as session:
        lifecycle.fail_step(session, failing.lease, BAD_MEDIA, failed_attempts=3)
        lifecycle.delete_job(session, job.id)
        make_late(session, "steps", "lease_expires_at")
    twice(upkeep.reap_lost_steps)
    assert [step.state for step in read_steps(sessions, job)] == ["failed", "canceled"]


@pytest.mark.parametrize(
    ("column", "started", "state", "code"),
    [("start_by", False, JobState.EXPIRED, "start_deadline"), ("stop_by", True, JobState.FAILED, "timeout")],
)
def test_a_job_whose_time_is_over_ends_once(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, take: Take, column: str, state: JobState, code: str,
    *, started: bool,
) -> None:  # fmt: skip
    job = make_job()
    if started:
        take()
    upkeep.end_late_jobs()
    assert read_job(sessions, job).state == (JobState.RUNNING if started else JobState.QUEUED)
    with sessions.begin() as session:
        make_late(session, "jobs", column)
    twice(upkeep.end_late_jobs)
    ended = read_job(sessions, job)
    assert (ended.state, ended.error and ended.error["code"]) == (state, code)
    assert told(sessions, "state").count(state) == 1


# --- hints ---------------------------------------------------------------------------------------------------------


def test_a_step_that_nobody_took_is_hinted_again_once(
    upkeep: Upkeep, sessions: SessionFactory, broker: Broker, make_job: MakeJob
) -> None:
    add_worker(sessions)
    [step] = read_steps(sessions, make_job())
    upkeep.hint_waiting_steps()
    with sessions.begin() as session:
        make_late(session, "steps", "hint_at")
    twice(upkeep.hint_waiting_steps)
    upkeep.hints.close()
    assert broker.steps() == [step.id]


def test_every_step_is_hinted_after_the_broker_lost_everything(
    upkeep: Upkeep, sessions: SessionFactory, broker: Broker, make_job: MakeJob
) -> None:
    steps = [read_steps(sessions, make_job())[0].id for _ in range(3)]
    for _ in steps:
        add_worker(sessions)
    broker.client.flushall()
    with sessions.begin() as session:
        make_late(session, "steps", "hint_at")
    upkeep.hint_waiting_steps()
    upkeep.hints.close()
    assert sorted(broker.steps()) == sorted(steps)


def test_the_sender_is_woken_while_news_are_due(
    upkeep: Upkeep, sessions: SessionFactory, broker: Broker, make_job: MakeJob
) -> None:
    job = make_job(webhook_url="https://receiver.example")
    upkeep.hint_due_deliveries()
    with sessions.begin() as session:
        lifecycle.request_cancel(session, job.id)
    upkeep.hint_due_deliveries()
    with sessions.begin() as session:
        session.execute(text("UPDATE webhook_deliveries SET next_attempt_at = now() + interval '1 minute'"))
    upkeep.hint_due_deliveries()
    upkeep.hints.close()
    assert broker.senders() == 1


# --- the round -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [StorageUnavailable("the storage cannot be reached"), ZeroDivisionError()])
def test_a_chore_that_fails_does_not_stop_the_others(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, take: Take, error: Exception
) -> None:
    job = make_job()
    take()
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
    stopping = threading.Event()

    def fail() -> None:
        raise error

    run_until(stopping, (fail, upkeep.reap_lost_steps, stopping.set), rest_seconds=lambda: 0.01)
    assert read_steps(sessions, job)[0].state == StepState.QUEUED


def test_upkeep_rests_for_no_longer_than_the_next_lease_lasts(upkeep: Upkeep, make_job: MakeJob, take: Take) -> None:
    period = upkeep.settings.upkeep.period_seconds
    assert upkeep.rest_seconds() == period
    make_job(steps=2)
    take(lease_seconds=3600)
    assert upkeep.rest_seconds() == period
    take(lease_seconds=period / 2)
    assert 0 < upkeep.rest_seconds() < period
