"""Upkeep: each chore puts right what a death or a lost message left behind, and doing it again changes nothing."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, text, update
from starlette.testclient import TestClient

from shared import lifecycle
from shared.broker import Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.lifecycle import ClaimedStep
from shared.models import IdempotencyKey, Job, JobEvent, JobState, Step, StepState, Tenant, Upload, Worker, create_id
from shared.storage import Storage, job_prefix, upload_key
from tests.integration.conftest import (
    BAD_MEDIA,
    Broker,
    MakeJob,
    Submit,
    add_worker,
    count_rows,
    make_late,
    read_job,
    read_steps,
)
from tests.integration.workbench import Workbench
from worker.upkeep import Upkeep

Claim = Callable[..., ClaimedStep]
Chore = Callable[[], None]


@pytest.fixture
def upkeep(settings: Settings, sessions: SessionFactory, storage: Storage, hints: Hints) -> Upkeep:
    return Upkeep(settings=settings, sessions=sessions, storage=storage, hints=hints)


def twice(chore: Chore) -> None:
    chore()
    chore()


def events(sessions: SessionFactory, job: Job, kind: str) -> list[dict[str, Any]]:
    with sessions() as session:
        wanted = select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.type == kind).order_by(JobEvent.id)
        return list(session.scalars(wanted))


# --- jobs and steps ------------------------------------------------------------------------------------------------


def test_a_lost_step_is_queued_again_once_and_the_event_says_so(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job()
    claim()
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
    twice(upkeep.reap_lost_steps)
    [step] = read_steps(sessions, job)
    assert (step.state, step.lost) == (StepState.QUEUED, 1)
    assert [each["outcome"] for each in events(sessions, job, "attempt")] == ["started", "lost"]


def test_all_lost_steps_are_taken_back_at_once(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    jobs = [make_job() for _ in range(3)]
    for _ in jobs:
        claim()
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
    upkeep.reap_lost_steps()
    assert [step.state for job in jobs for step in read_steps(sessions, job)] == ["queued"] * 3


def test_several_reapers_take_a_step_back_once(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    jobs = [make_job() for _ in range(5)]
    for _ in jobs:
        claim()
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
    reaping = [threading.Thread(target=upkeep.reap_lost_steps) for _ in range(4)]
    for each in reaping:
        each.start()
    for each in reaping:
        each.join()
    assert [step.lost for job in jobs for step in read_steps(sessions, job)] == [1] * 5


def test_a_step_that_outlived_its_deleted_job_is_taken_back(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    """Its job failed for another step's sake and was deleted while this one still ran."""
    job = make_job(steps=2)
    failing, _running = claim(), claim()
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
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, claim: Claim, column: str, state: JobState, code: str,
    *, started: bool,
) -> None:  # fmt: skip
    job = make_job()
    if started:
        claim()
    upkeep.end_late_jobs()
    assert read_job(sessions, job).state == (JobState.RUNNING if started else JobState.QUEUED)
    with sessions.begin() as session:
        make_late(session, "jobs", column)
    twice(upkeep.end_late_jobs)
    ended = read_job(sessions, job)
    assert (ended.state, ended.error and ended.error["code"]) == (state, code)
    assert [each["state"] for each in events(sessions, job, "state")].count(state) == 1


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


# --- what is over --------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(submit: Submit, workbench: Workbench, sessions: SessionFactory) -> Job:
    """A job with a source and a result in the storage."""
    submit()
    workbench.run()
    with sessions() as session:
        return session.scalars(select(Job)).one()


def files(storage: Storage, job: Job) -> list[str]:
    return storage.list_keys(job_prefix(job.tenant_id, job.id))


def test_a_deleted_job_goes_with_its_files(
    upkeep: Upkeep, api: TestClient, storage: Storage, sessions: SessionFactory, finished: Job
) -> None:
    upkeep.purge_jobs()
    assert len(files(storage, finished)) == 3, "its source, its mask and its manifest"
    api.delete(f"/v1/jobs/{finished.id}")
    twice(upkeep.purge_jobs)
    assert files(storage, finished) == []
    assert [count_rows(sessions, table) for table in (Job, Step, JobEvent)] == [0, 0, 0]


def test_a_job_past_its_retention_goes_with_its_files(
    upkeep: Upkeep, storage: Storage, sessions: SessionFactory, finished: Job
) -> None:
    with sessions.begin() as session:
        make_late(session, "jobs", "expires_at")
    twice(upkeep.purge_jobs)
    assert (files(storage, finished), count_rows(sessions, Job)) == ([], 0)


def test_other_jobs_files_are_left_alone(
    upkeep: Upkeep, api: TestClient, submit: Submit, workbench: Workbench, finished: Job
) -> None:
    kept = submit().json()["links"]
    workbench.run()
    api.delete(f"/v1/jobs/{finished.id}")
    upkeep.purge_jobs()
    [file] = api.get(kept["result"]).json()["files"]
    assert httpx2.get(file["url"]).status_code == 200


def test_the_row_stays_until_the_files_are_gone(
    upkeep: Upkeep, settings: Settings, sessions: SessionFactory, api: TestClient, finished: Job, closed_port: int
) -> None:
    api.delete(f"/v1/jobs/{finished.id}")
    nowhere = settings.storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{closed_port}"})
    broken = Upkeep(
        settings=settings, sessions=sessions, storage=Storage.from_settings(nowhere), hints=upkeep.hints
    )  # fmt: skip
    with pytest.raises(Exception, match="cannot be reached"):
        broken.purge_jobs()
    assert count_rows(sessions, Job) == 1
    upkeep.purge_jobs()
    assert count_rows(sessions, Job) == 0


def test_a_job_goes_only_when_none_of_its_steps_runs_any_more(
    upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob, claim: Claim
) -> None:
    job = make_job(steps=2)
    failing, running = claim(), claim()
    with sessions.begin() as session:
        lifecycle.fail_step(session, failing.lease, BAD_MEDIA, failed_attempts=3)
        lifecycle.delete_job(session, job.id)
    upkeep.purge_jobs()
    assert count_rows(sessions, Job) == 1
    with sessions.begin() as session:
        lifecycle.stop_step(session, running.lease)
    upkeep.purge_jobs()
    assert count_rows(sessions, Job) == 0


def test_news_of_a_removed_job_are_still_sent(upkeep: Upkeep, sessions: SessionFactory, make_job: MakeJob) -> None:
    job = make_job(webhook_url="https://receiver.example")
    with sessions.begin() as session:
        lifecycle.request_cancel(session, job.id)
        lifecycle.delete_job(session, job.id)
    upkeep.purge_jobs()
    with sessions() as session:
        assert session.scalars(text("SELECT state FROM webhook_deliveries")).all() == ["pending"]


@pytest.fixture
def expired_upload(sessions: SessionFactory, storage: Storage, tenant: Tenant) -> Upload:
    upload_id = create_id()
    key = upload_key(tenant.id, upload_id)
    storage.put(key, b"bytes", content_type="image/png")
    with sessions.begin() as session:
        row = Upload(
            id=upload_id, tenant_id=tenant.id, filename="a.png", content_type="image/png", size_bytes=5,
            storage_key=key, etag="an etag", expires_at=func.now() - timedelta(seconds=1),
        )  # fmt: skip
        session.add(row)
    return row


def test_an_expired_upload_goes_with_its_bytes(
    upkeep: Upkeep, sessions: SessionFactory, storage: Storage, expired_upload: Upload
) -> None:
    twice(upkeep.purge_uploads)
    assert (count_rows(sessions, Upload), storage.list_keys("")) == (0, [])


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_an_expired_upload_is_kept_while_an_unfinished_job_reads_it(
    upkeep: Upkeep, sessions: SessionFactory, storage: Storage, expired_upload: Upload, job_in: MakeJob, state: JobState
) -> None:
    job = job_in(state)
    with sessions.begin() as session:
        session.execute(update(Job).values(upload_id=expired_upload.id))
    twice(upkeep.purge_uploads)
    assert storage.list_keys("") == [expired_upload.storage_key]
    with sessions.begin() as session:
        lifecycle.move_job(session, job.id, JobState.CANCELED)
    upkeep.purge_uploads()
    assert (count_rows(sessions, Upload), count_rows(sessions, Job), storage.list_keys("")) == (0, 1, [])


def test_an_upload_that_has_not_expired_is_kept(
    upkeep: Upkeep, sessions: SessionFactory, storage: Storage, expired_upload: Upload
) -> None:
    with sessions.begin() as session:
        session.execute(update(Upload).values(expires_at=func.now() + timedelta(minutes=1)))
    upkeep.purge_uploads()
    assert (count_rows(sessions, Upload), len(storage.list_keys(""))) == (1, 1)


def test_workers_that_fell_silent_are_forgotten(upkeep: Upkeep, sessions: SessionFactory) -> None:
    silent, alive = add_worker(sessions), add_worker(sessions)
    gone = timedelta(seconds=upkeep.settings.upkeep.worker_gone_seconds + 1)
    with sessions.begin() as session:
        session.execute(update(Worker).where(Worker.id == silent.id).values(heartbeat_at=func.now() - gone))
    twice(upkeep.forget_the_past)
    with sessions() as session:
        assert session.scalars(select(Worker.id)).all() == [alive.id]


def test_keys_past_their_time_are_forgotten(upkeep: Upkeep, submit: Submit, sessions: SessionFactory) -> None:
    submit(headers={"Idempotency-Key": "old"})
    with sessions.begin() as session:
        make_late(session, "idempotency_keys", "expires_at")
    submit(headers={"Idempotency-Key": "new"})
    twice(upkeep.forget_the_past)
    with sessions() as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["new"]
    assert count_rows(sessions, Job) == 2


# --- the round -----------------------------------------------------------------------------------------------------


def test_a_chore_that_fails_does_not_stop_the_others(
    settings: Settings, sessions: SessionFactory, hints: Hints, make_job: MakeJob, claim: Claim, closed_port: int
) -> None:
    """The storage is away, so that nothing can be purged; steps are taken back all the same."""
    deleted, lost = make_job(), make_job()
    with sessions.begin() as session:
        lifecycle.request_cancel(session, deleted.id)
        lifecycle.delete_job(session, deleted.id)
    claim()
    with sessions.begin() as session:
        make_late(session, "steps", "lease_expires_at")
    add_worker(sessions, heartbeat_at=func.now() - timedelta(days=1))
    nowhere = settings.storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{closed_port}"})
    quick = settings.model_copy(update={"upkeep": settings.upkeep.model_copy(update={"period_seconds": 0.01})})
    upkeep = Upkeep(settings=quick, sessions=sessions, storage=Storage.from_settings(nowhere), hints=hints)
    stopping = threading.Event()
    running = threading.Thread(target=upkeep.run_until, args=(stopping,))
    running.start()
    try:
        while count_rows(sessions, Worker):  # the last chore of a round
            stopping.wait(0.01)
    finally:
        stopping.set()
        running.join()
    assert read_steps(sessions, lost)[0].state == StepState.QUEUED
    assert count_rows(sessions, Job) == 2
