"""The life of a job on a real database: which moves exist, who may make them, and what each leaves behind."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from shared import lateness, lifecycle
from shared.db import SessionFactory
from shared.errors import InvalidTransition, JobActive, LeaseLost
from shared.lifecycle import JOB_MOVES, STEP_MOVES, ClaimedStep
from shared.locks import Lease
from shared.models import Job, JobEvent, JobState, Step, StepState, Tenant, WebhookDelivery
from tests.integration.conftest import BAD_MEDIA, MODEL, TIMING, TROUBLE, MakeJob, make_late, read_job, read_steps

Claim = Callable[..., ClaimedStep]

FORCED_STEP_VALUES: dict[StepState, dict[str, Any]] = {StepState.RUNNING: {"lease_expires_at": func.now()}}
FORCED_JOB_VALUES: dict[JobState, dict[str, Any]] = {
    JobState.SUCCEEDED: {"manifest_key": "a key"},
    JobState.FAILED: {"error": {"code": "c", "detail": "d", "retryable": False}},
    JobState.EXPIRED: {"error": {"code": "c", "detail": "d", "retryable": False}},
    JobState.QUEUED: {"error": None},
}


@pytest.mark.parametrize(("before", "after"), list(product(JobState, JobState)))
def test_a_job_moves_only_where_the_table_says(
    sessions: SessionFactory, job_in: MakeJob, before: JobState, after: JobState
) -> None:
    job = job_in(before)
    with sessions.begin() as session:
        if after in JOB_MOVES[before]:
            lifecycle.move_job(session, job.id, after, **FORCED_JOB_VALUES.get(after, {}))
        else:
            with pytest.raises(InvalidTransition):
                lifecycle.move_job(session, job.id, after, **FORCED_JOB_VALUES.get(after, {}))
    assert read_job(sessions, job).state == (after if after in JOB_MOVES[before] else before)


@pytest.mark.parametrize(("before", "after"), list(product(StepState, StepState)))
def test_a_step_moves_only_where_the_table_says(
    sessions: SessionFactory, make_job: MakeJob, before: StepState, after: StepState
) -> None:
    job = make_job()
    [step] = read_steps(sessions, job)
    with sessions.begin() as session:
        lease = "now()" if before == StepState.RUNNING else "NULL"
        session.execute(text(f"UPDATE steps SET state = '{before}', lease_expires_at = {lease}"))  # noqa: S608
    with sessions.begin() as session:
        if after in STEP_MOVES[before]:
            lifecycle.move_step(session, step.id, after, **FORCED_STEP_VALUES.get(after, {}))
        else:
            with pytest.raises(InvalidTransition):
                lifecycle.move_step(session, step.id, after, **FORCED_STEP_VALUES.get(after, {}))
    [step] = read_steps(sessions, job)
    assert step.state == (after if after in STEP_MOVES[before] else before)


def test_the_database_itself_refuses_a_result_without_success(session_of_job: tuple[SessionFactory, Job]) -> None:
    sessions, job = session_of_job
    with sessions() as session, pytest.raises(IntegrityError):
        session.execute(text("UPDATE jobs SET manifest_key = 'x' WHERE id = :id"), {"id": job.id})


@pytest.fixture
def session_of_job(sessions: SessionFactory, make_job: MakeJob) -> tuple[SessionFactory, Job]:
    return sessions, make_job()


def test_every_move_of_a_job_leaves_an_event_in_order(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    claimed = claim()
    with sessions.begin() as session:
        lifecycle.publish(session, claimed.lease, manifest_key="a key", model=MODEL, timing=TIMING)
    with sessions() as session:
        events = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.id)).all()
    assert [event.data["state"] for event in events if event.type == "state"] == ["queued", "running", "succeeded"]
    assert [event.data["outcome"] for event in events if event.type == "attempt"] == ["started", "done"]


@pytest.mark.parametrize("state", [state for state in JobState if state.is_terminal])
def test_an_end_queues_exactly_one_webhook_in_the_same_transaction(
    sessions: SessionFactory, make_job: MakeJob, state: JobState
) -> None:
    job = make_job(webhook_url="https://receiver.example/hook")
    with sessions() as session:
        if state in (JobState.SUCCEEDED, JobState.FAILED):
            lifecycle.move_job(session, job.id, JobState.RUNNING)
        lifecycle.move_job(session, job.id, state, **FORCED_JOB_VALUES.get(state, {}))
        assert session.scalar(select(func.count()).select_from(WebhookDelivery)) == 1
        session.rollback()
        assert session.scalar(select(func.count()).select_from(WebhookDelivery)) == 0


def test_a_lost_step_is_taken_back_and_its_zombie_writes_nothing(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    zombie = claim().lease
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
        taken = lateness.reap(session, lost_attempts=3)
        assert taken is not None
        assert taken.state == StepState.QUEUED
    second = claim()
    assert second.lease.attempt == zombie.attempt + 1
    for write in _writes_of(zombie):
        with sessions() as session, pytest.raises(LeaseLost):
            write(session)
    with sessions.begin() as session:
        lifecycle.publish(session, second.lease, manifest_key="second", model=MODEL, timing=TIMING)
    finished = read_job(sessions, job)
    assert (finished.manifest_key, finished.attempts) == ("second", 2)


def _writes_of(lease: Lease) -> list[Callable[..., object]]:
    return [
        lambda session: lifecycle.heartbeat(session, lease, lease_seconds=30),
        lambda session: lifecycle.report_progress(session, lease, stage="x", done=0, total=1),
        lambda session: lifecycle.publish(session, lease, manifest_key="zombie", model=MODEL, timing=TIMING),
        lambda session: lifecycle.fail_step(session, lease, TROUBLE, failed_attempts=3),
        lambda session: lifecycle.release_step(session, lease),
        lambda session: lifecycle.stop_step(session, lease),
    ]


def test_a_renewed_lease_is_not_taken_back(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    make_job()
    lease = claim().lease
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
        assert lifecycle.heartbeat(session, lease, lease_seconds=30) == "go on"
        assert lateness.reap(session, lost_attempts=3) is None


def test_a_job_whose_workers_keep_vanishing_fails_with_worker_lost(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    for _ in range(3):
        claim()
        with sessions.begin() as session:
            make_late(session, "steps", "lease_expires_at")
            lateness.reap(session, lost_attempts=3)
    failed = read_job(sessions, job)
    assert failed.state == JobState.FAILED
    assert failed.error is not None
    assert failed.error["code"] == "worker_lost"


def test_a_drained_step_spends_no_attempt(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    job = make_job()
    for _ in range(5):
        with sessions.begin() as session:
            lifecycle.release_step(session, claim().lease)
    [step] = read_steps(sessions, job)
    assert (step.state, step.lost, step.failures) == (StepState.QUEUED, 0, 0)


def test_trouble_is_tried_again_after_a_pause_and_then_fails(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    for attempt in range(1, 4):
        claimed = claim()
        assert claimed is not None, f"attempt {attempt} was not offered"
        with sessions.begin() as session:
            lifecycle.fail_step(session, claimed.lease, TROUBLE, failed_attempts=3)
        if attempt < 3:
            assert claim() is None, "a step was offered before its pause was over"
            with sessions.begin() as session:
                make_late(session, "steps", "run_after")
    failed = read_job(sessions, job)
    assert failed.state == JobState.FAILED
    assert failed.error is not None
    assert failed.error["code"] == TROUBLE.code


def test_bad_media_fails_at_once(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    job = make_job()
    with sessions.begin() as session:
        lifecycle.fail_step(session, claim().lease, BAD_MEDIA, failed_attempts=3)
    assert read_job(sessions, job).state == JobState.FAILED


def test_a_failure_stops_the_other_steps_of_the_job(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    job = make_job(steps=3)
    first, second = claim(), claim()
    with sessions.begin() as session:
        lifecycle.fail_step(session, first.lease, BAD_MEDIA, failed_attempts=3)
    with sessions.begin() as session:
        assert lifecycle.heartbeat(session, second.lease, lease_seconds=30) == "stop"
        lifecycle.stop_step(session, second.lease)
    assert [step.state for step in read_steps(sessions, job)] == ["failed", "canceled", "canceled"]
    assert read_job(sessions, job).state == JobState.FAILED


def test_canceling_a_queued_job_ends_it_at_once(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    job = make_job(steps=2)
    with sessions.begin() as session:
        assert lifecycle.request_cancel(session, job.id).state == JobState.CANCELED
    assert claim() is None


def test_canceling_a_running_job_waits_for_its_worker_to_stop(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    lease = claim().lease
    with sessions.begin() as session:
        assert lifecycle.request_cancel(session, job.id).state == JobState.RUNNING
    with sessions.begin() as session:
        assert lifecycle.heartbeat(session, lease, lease_seconds=30) == "stop"
        lifecycle.stop_step(session, lease)
    assert read_job(sessions, job).state == JobState.CANCELED


def test_a_result_that_comes_after_the_cancel_is_not_published(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    lease = claim().lease
    with sessions.begin() as session:
        lifecycle.request_cancel(session, job.id)
    with sessions() as session, pytest.raises(InvalidTransition):
        lifecycle.publish(session, lease, manifest_key="late", model=MODEL, timing=TIMING)
    assert read_job(sessions, job).manifest_key is None


def test_a_canceled_job_whose_worker_vanishes_is_canceled_by_upkeep(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    claim()
    with sessions.begin() as session:
        lifecycle.request_cancel(session, job.id)
        make_late(session, "steps", "lease_expires_at")
        lateness.reap(session, lost_attempts=1)
    assert read_job(sessions, job).state == JobState.CANCELED


def test_a_job_nobody_starts_by_its_deadline_expires(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    job = make_job()
    with sessions.begin() as session:
        assert lateness.expire(session) is None
        make_late(session, "jobs", "start_by")
        lateness.expire(session)
    assert read_job(sessions, job).state == JobState.EXPIRED
    assert claim() is None


def test_a_job_that_runs_too_long_fails_with_timeout(sessions: SessionFactory, make_job: MakeJob, claim: Claim) -> None:
    job = make_job(steps=2)
    lease = claim().lease
    with sessions.begin() as session:
        assert lateness.time_out(session) is None
        make_late(session, "jobs", "stop_by")
        lateness.time_out(session)
    failed = read_job(sessions, job)
    assert failed.error is not None
    assert failed.error["code"] == "timeout"
    with sessions.begin() as session:
        assert lifecycle.heartbeat(session, lease, lease_seconds=30) == "stop"
        lifecycle.stop_step(session, lease)
    assert [step.state for step in read_steps(sessions, job)] == ["canceled", "canceled"]


def test_a_retry_keeps_finished_steps_and_runs_the_rest_again(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job(steps=2)
    done, failing = claim(), claim()
    with sessions.begin() as session:
        lifecycle.move_step(session, done.lease.step_id, StepState.DONE, fence=done.lease.attempt)
        lifecycle.fail_step(session, failing.lease, BAD_MEDIA, failed_attempts=3)
    with sessions.begin() as session:
        again, woken = lifecycle.retry(session, job.id)
        assert (again.state, again.error) == (JobState.QUEUED, None)
        assert [step.ordinal for step in woken] == [1]
    assert [step.state for step in read_steps(sessions, job)] == ["done", "queued"]
    assert claim().lease.attempt == 2


def test_a_step_that_still_ran_when_its_job_was_retried_goes_on(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job(steps=2)
    failing, running = claim(), claim()
    with sessions.begin() as session:
        lifecycle.fail_step(session, failing.lease, BAD_MEDIA, failed_attempts=3)
    with sessions.begin() as session:
        assert lifecycle.retry(session, job.id)[0].state == JobState.RUNNING
        assert lifecycle.heartbeat(session, running.lease, lease_seconds=30) == "go on"


def test_an_active_job_is_not_deleted(sessions: SessionFactory, job_in: MakeJob) -> None:
    for state in (JobState.QUEUED, JobState.RUNNING):
        job = job_in(state)
        with sessions() as session, pytest.raises(JobActive):
            lifecycle.delete_job(session, job.id)


def test_cancels_retries_and_finishes_in_a_crowd_never_wait_for_each_other(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    """A deadlock would surface as a database error in one of the threads."""
    offer: Callable[[], ClaimedStep | None] = claim
    jobs = [make_job(steps=4) for _ in range(4)]

    def work(_: int) -> None:
        for _ in range(6):
            claimed = offer()
            if claimed is None:
                return
            with sessions.begin() as session:
                lifecycle.fail_step(session, claimed.lease, BAD_MEDIA, failed_attempts=1)

    def meddle(job: Job) -> None:
        for change in (lifecycle.request_cancel, lifecycle.retry, lifecycle.request_cancel, lifecycle.retry):
            with sessions() as session:
                try:
                    change(session, job.id)
                    session.commit()
                except InvalidTransition:
                    session.rollback()

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(work, number) for number in range(4)] + [pool.submit(meddle, job) for job in jobs]
        for each in running:
            each.result(timeout=60)


def test_one_step_is_claimed_once_however_many_ask(
    sessions: SessionFactory, make_job: MakeJob, claim: Claim, tenant: Tenant
) -> None:
    for _ in range(5):
        make_job()
    with ThreadPoolExecutor(10) as pool:
        offered: list[ClaimedStep | None] = list(pool.map(lambda _: claim(), range(10)))
        claimed = [each for each in offered if each is not None]
    assert len(claimed) == len({each.lease.step_id for each in claimed}) == 5
    with sessions() as session:
        assert set(session.scalars(select(Step.attempt))) == {1}
