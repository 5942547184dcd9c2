"""What is over, or was deleted, goes with its files; doing it again, or going on after a death, changes nothing."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import httpx2
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from shared import endpoints, lifecycle
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import (
    Batch,
    DeliveryState,
    IdempotencyKey,
    Job,
    JobEvent,
    JobState,
    Step,
    Tenant,
    Upload,
    WebhookDelivery,
    WebhookEndpoint,
    Worker,
    create_id,
)
from shared.storage import Storage, job_prefix, upload_key
from tests.integration.commits import watched_commits
from tests.integration.conftest import (
    BAD_MEDIA,
    MakeJob,
    Submit,
    Take,
    add_worker,
    count_rows,
    make_late,
    problem,
    read_only,
    twice,
)
from tests.integration.workbench import Workbench
from worker import housekeeping as chores
from worker.housekeeping import Housekeeping

# --- jobs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(submit: Submit, workbench: Workbench, sessions: SessionFactory) -> Job:
    """A job with a source and a result in the storage."""
    submit()
    workbench.run()
    return read_only(sessions, Job)


def files(storage: Storage, job: Job) -> list[str]:
    return storage.list_keys(job_prefix(job.tenant_id, job.id))


def test_a_deleted_job_goes_with_its_files(
    housekeeping: Housekeeping, api: TestClient, storage: Storage, sessions: SessionFactory, finished: Job
) -> None:
    housekeeping.purge_jobs()
    assert len(files(storage, finished)) == 3, "its source, its mask and its manifest"
    api.delete(f"/v1/jobs/{finished.id}")
    twice(housekeeping.purge_jobs)
    assert files(storage, finished) == []
    assert [count_rows(sessions, table) for table in (Job, Step, JobEvent)] == [0, 0, 0]


def test_a_job_past_its_retention_goes_with_its_files(
    housekeeping: Housekeeping, storage: Storage, sessions: SessionFactory, finished: Job
) -> None:
    with sessions.begin() as session:
        make_late(session, "jobs", "expires_at")
    twice(housekeeping.purge_jobs)
    assert (files(storage, finished), count_rows(sessions, Job)) == ([], 0)


def test_other_jobs_files_are_left_alone(
    housekeeping: Housekeeping, api: TestClient, submit: Submit, workbench: Workbench, finished: Job
) -> None:
    kept = submit().json()["links"]
    workbench.run()
    api.delete(f"/v1/jobs/{finished.id}")
    housekeeping.purge_jobs()
    [file] = api.get(kept["result"]).json()["files"]
    assert httpx2.get(file["url"]).status_code == 200


def test_the_row_stays_until_the_files_are_gone(
    housekeeping: Housekeeping,
    settings: Settings,
    sessions: SessionFactory,
    api: TestClient,
    finished: Job,
    closed_port: int,
) -> None:
    api.delete(f"/v1/jobs/{finished.id}")
    nowhere = settings.storage.model_copy(update={"endpoint_url": f"http://127.0.0.1:{closed_port}"})
    broken = Housekeeping(settings=settings, sessions=sessions, storage=Storage.from_settings(nowhere))
    with pytest.raises(Exception, match="cannot be reached"):
        broken.purge_jobs()
    assert count_rows(sessions, Job) == 1
    housekeeping.purge_jobs()
    assert count_rows(sessions, Job) == 0


def test_a_job_goes_only_when_none_of_its_steps_runs_any_more(
    housekeeping: Housekeeping, sessions: SessionFactory, make_job: MakeJob, take: Take
) -> None:
    job = make_job(steps=2)
    failing, running = take(), take()
    with sessions.begin() as session:
        lifecycle.fail_step(session, failing.lease, BAD_MEDIA, failed_attempts=3)
        lifecycle.delete_job(session, job.id)
    housekeeping.purge_jobs()
    assert count_rows(sessions, Job) == 1
    with sessions.begin() as session:
        lifecycle.stop_step(session, running.lease)
    housekeeping.purge_jobs()
    assert count_rows(sessions, Job) == 0


def test_news_of_a_removed_job_are_still_sent(
    housekeeping: Housekeeping, sessions: SessionFactory, end_job: MakeJob
) -> None:
    job = end_job("https://receiver.example")
    with sessions.begin() as session:
        lifecycle.delete_job(session, job.id)
    housekeeping.purge_jobs()
    assert read_only(sessions, WebhookDelivery).state == DeliveryState.PENDING


def test_all_that_is_over_goes_in_one_round_however_much_it_is(
    housekeeping: Housekeeping, sessions: SessionFactory, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chores, "AT_ONCE", 2)
    monkeypatch.setattr(chores, "ROWS_AT_ONCE", 1)
    for _ in range(5):
        make_job(steps=2)
    with sessions.begin() as session:
        lifecycle.request_cancels(session, session.scalars(select(Job.id)).all())
        make_late(session, "jobs", "expires_at")
    housekeeping.purge_jobs()
    assert [count_rows(sessions, table) for table in (Job, Step, JobEvent)] == [0, 0, 0]


def test_a_death_between_the_files_and_the_row_is_made_good_by_the_next_round(
    housekeeping: Housekeeping, api: TestClient, storage: Storage, sessions: SessionFactory, finished: Job
) -> None:
    api.delete(f"/v1/jobs/{finished.id}")
    with watched_commits(sessions, lambda _: not files(storage, finished)), pytest.raises(OperationalError):
        housekeeping.purge_jobs()
    assert (files(storage, finished), count_rows(sessions, Job)) == ([], 1)
    housekeeping.purge_jobs()
    assert count_rows(sessions, Job) == 0


def test_several_at_once_remove_everything_and_meet_no_trouble(
    housekeeping: Housekeeping, sessions: SessionFactory, submit_batch: Submit, api: TestClient, storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(chores, "AT_ONCE", 3)
    batch = submit_batch(12).json()
    api.post(batch["links"]["cancel"])
    with sessions.begin() as session:
        for column in ("expires_at", "source_expires_at"):
            make_late(session, "jobs", column)
        make_late(session, "uploads", "expires_at")

    def keep_house(_: int) -> None:
        housekeeping.purge_jobs()
        housekeeping.purge_uploads()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(keep_house, range(4)))
    housekeeping.purge_uploads()
    assert [count_rows(sessions, table) for table in (Job, Batch, Upload)] == [0, 0, 0]
    assert storage.list_keys("") == []


# --- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_goes_with_the_last_of_its_jobs(
    housekeeping: Housekeeping, api: TestClient, submit_batch: Submit, sessions: SessionFactory
) -> None:
    batch = submit_batch(2).json()
    api.post(batch["links"]["cancel"])
    first, second = api.get(batch["links"]["jobs"]).json()["items"]
    api.delete(first["links"]["self"])
    housekeeping.purge_jobs()
    assert api.get(batch["links"]["self"]).status_code == 200
    api.delete(second["links"]["self"])
    twice(housekeeping.purge_jobs)
    assert (count_rows(sessions, Job), count_rows(sessions, Batch)) == (0, 0)


def test_a_deleted_batch_goes_with_its_jobs_whether_they_have_ended_or_not(
    housekeeping: Housekeeping, api: TestClient, submit_batch: Submit, sessions: SessionFactory, take: Take,
    storage: Storage,
) -> None:  # fmt: skip
    batch = submit_batch(3).json()
    running = take()
    assert api.delete(batch["links"]["self"]).status_code == 204
    problem(api.get(batch["links"]["self"]), 404, "not_found")
    problem(api.delete(batch["links"]["self"]), 404, "not_found")
    assert api.get("/v1/batches").json()["items"] == []
    [seen] = api.get("/v1/jobs").json()["items"]
    assert (seen["id"], seen["cancel_requested_at"] is not None) == (str(running.job.id), True)
    for chore in (housekeeping.finish_deletions, housekeeping.purge_jobs):
        chore()
    assert (count_rows(sessions, Job), count_rows(sessions, Batch)) == (1, 1), "while a worker still has one"
    with sessions.begin() as session:
        lifecycle.stop_step(session, running.lease)
    for chore in (housekeeping.finish_deletions, housekeeping.purge_jobs):
        twice(chore)
    assert (count_rows(sessions, Job), count_rows(sessions, Batch)) == (0, 0)


def test_what_a_request_that_died_left_of_a_deleted_batch_goes_as_well(
    housekeeping: Housekeeping, submit_batch: Submit, sessions: SessionFactory
) -> None:
    submit_batch(2)
    with sessions.begin() as session:
        session.execute(update(Batch).values(deleted_at=func.now()))
    for chore in (housekeeping.finish_deletions, housekeeping.purge_jobs):
        chore()
    assert (count_rows(sessions, Job), count_rows(sessions, Batch)) == (0, 0)


def test_a_batch_of_another_tenant_cannot_be_deleted(
    api: TestClient, submit_batch: Submit, foreign: dict[str, str]
) -> None:
    batch = submit_batch(1).json()
    problem(api.delete(batch["links"]["self"], headers=foreign), 404, "not_found")
    assert api.get(batch["links"]["self"]).json()["state"] == "running"


# --- uploads -------------------------------------------------------------------------------------------------------


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
    housekeeping: Housekeeping, sessions: SessionFactory, storage: Storage, expired_upload: Upload
) -> None:
    twice(housekeeping.purge_uploads)
    assert (count_rows(sessions, Upload), storage.list_keys("")) == (0, [])


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_an_expired_upload_is_kept_while_an_unfinished_job_reads_it(
    housekeeping: Housekeeping,
    sessions: SessionFactory,
    storage: Storage,
    expired_upload: Upload,
    job_in: MakeJob,
    state: JobState,
) -> None:
    job = job_in(state)
    with sessions.begin() as session:
        session.execute(update(Job).values(upload_id=expired_upload.id))
    twice(housekeeping.purge_uploads)
    assert storage.list_keys("") == [expired_upload.storage_key]
    with sessions.begin() as session:
        lifecycle.move_job(session, job.id, JobState.CANCELED)
        make_late(session, "jobs", "source_expires_at")
    housekeeping.purge_uploads()
    assert (count_rows(sessions, Upload), count_rows(sessions, Job), storage.list_keys("")) == (0, 1, [])


def test_an_upload_that_has_not_expired_is_kept(
    housekeeping: Housekeeping, sessions: SessionFactory, storage: Storage, expired_upload: Upload
) -> None:
    with sessions.begin() as session:
        session.execute(update(Upload).values(expires_at=func.now() + timedelta(minutes=1)))
    housekeeping.purge_uploads()
    assert (count_rows(sessions, Upload), len(storage.list_keys(""))) == (1, 1)


# --- rows alone ----------------------------------------------------------------------------------------------------


def test_workers_that_fell_silent_are_forgotten(housekeeping: Housekeeping, sessions: SessionFactory) -> None:
    silent, alive = add_worker(sessions), add_worker(sessions)
    gone = timedelta(seconds=housekeeping.settings.upkeep.worker_gone_seconds + 1)
    with sessions.begin() as session:
        session.execute(update(Worker).where(Worker.id == silent.id).values(heartbeat_at=func.now() - gone))
    twice(housekeeping.forget_workers)
    with sessions() as session:
        assert session.scalars(select(Worker.id)).all() == [alive.id]


def test_keys_past_their_time_are_forgotten(
    housekeeping: Housekeeping, submit: Submit, sessions: SessionFactory
) -> None:
    submit(headers={"Idempotency-Key": "old"})
    with sessions.begin() as session:
        make_late(session, "idempotency_keys", "expires_at")
    submit(headers={"Idempotency-Key": "new"})
    twice(housekeeping.forget_keys)
    with sessions() as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["new"]
    assert count_rows(sessions, Job) == 2


def test_a_deleted_endpoint_goes_after_all_that_was_sent_to_it(
    housekeeping: Housekeeping, api: TestClient, end_job: MakeJob, sessions: SessionFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(endpoints, "FORGOTTEN_AT_ONCE", 1)
    gone, kept = (api.post("/v1/webhooks", json={"url": f"https://{name}.example"}).json() for name in ("a", "b"))
    for _ in range(2):
        end_job()
    assert api.delete(f"/v1/webhooks/{gone['id']}").status_code == 204
    shown = api.get("/v1/webhooks/deliveries").json()["items"]
    assert [each["endpoint_id"] for each in shown] == [kept["id"]] * 2
    assert (count_rows(sessions, WebhookEndpoint), count_rows(sessions, WebhookDelivery)) == (2, 4)
    twice(housekeeping.forget_endpoints)
    assert str(read_only(sessions, WebhookEndpoint).id) == kept["id"]
    assert count_rows(sessions, WebhookDelivery) == 2


def test_the_url_of_a_deleted_endpoint_can_be_registered_at_once(api: TestClient) -> None:
    first = api.post("/v1/webhooks", json={"url": "https://a.example"}).json()
    api.delete(f"/v1/webhooks/{first['id']}")
    problem(api.patch(f"/v1/webhooks/{first['id']}", json={"disabled": False}), 404, "not_found")
    second = api.post("/v1/webhooks", json={"url": "https://a.example"})
    assert second.status_code == 201
    assert [each["id"] for each in api.get("/v1/webhooks").json()] == [second.json()["id"]]
