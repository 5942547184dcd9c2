"""How long sources are kept, and results: by what their tenant decided, as each job says, and never too short."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from starlette.testclient import TestClient

from shared import intake, retention
from shared.broker import GPU
from shared.db import SessionFactory
from shared.errors import NotFound
from shared.models import Job, StepKind, Tenant, Upload
from shared.storage import Storage
from tests.integration.conftest import Submit, count_rows, make_late, new_job, problem, read_only
from tests.integration.workbench import Workbench
from worker.housekeeping import Housekeeping

Json = dict[str, Any]
DAY = 86400.0


@pytest.fixture
def decide(sessions: SessionFactory) -> Callable[..., None]:
    """As the operator does for the tenant under test."""

    def put(*, results: float | None = None, sources: float | None = None) -> None:
        with sessions.begin() as session:
            session.execute(update(Tenant).values(keep_results_seconds=results, keep_sources_seconds=sources))

    return put


@pytest.fixture
def submit_upload(api: TestClient, put_upload: Callable[..., str]) -> Callable[..., Json]:
    """A job whose source is an upload, a new one unless it is given."""

    def send(upload_id: str | None = None) -> Json:
        source = {"upload_id": upload_id or put_upload()}
        answer = api.post("/v1/jobs", json={"mode": "demo", "source": source})
        assert answer.status_code == 202, answer.text
        job: Json = answer.json()
        return job

    return send


def kept_seconds(job: Json) -> tuple[float, float | None]:
    """The result and the source, after the job's end."""
    ended, result, source = (
        datetime.fromisoformat(each) if each else None
        for each in (job["finished_at"], job["expires_at"], job["source"]["expires_at"])
    )
    assert ended
    assert result
    return (result - ended).total_seconds(), (source - ended).total_seconds() if source else None


def look(api: TestClient, job: Json) -> Json:
    found: Json = api.get(job["links"]["self"]).json()
    return found


def pass_by(sessions: SessionFactory, *columns: str) -> None:
    """What waiting would do."""
    with sessions.begin() as session:
        for column in columns:
            make_late(session, "jobs", column)


def cancel(api: TestClient, job: Json) -> None:
    assert api.post(job["links"]["cancel"]).status_code == 202


# --- what a job says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "sources", "kept"),
    [
        (None, None, (30 * DAY, 30 * DAY)),
        (90 * DAY, None, (90 * DAY, 90 * DAY)),
        (None, DAY, (30 * DAY, DAY)),
        (DAY, 7 * DAY, (DAY, DAY)),
    ],
)
def test_a_job_says_how_long_its_result_and_its_source_are_kept(
    api: TestClient, submit: Submit, decide: Callable[..., None], results: float | None, sources: float | None,
    kept: tuple[float, float],
) -> None:  # fmt: skip
    decide(results=results, sources=sources)
    job = submit().json()
    assert (job["expires_at"], job["source"]["expires_at"]) == (None, None)
    cancel(api, job)
    assert kept_seconds(look(api, job)) == kept


def test_a_job_keeps_the_rules_that_it_was_submitted_under(
    api: TestClient, submit: Submit, decide: Callable[..., None]
) -> None:
    decide(sources=DAY)
    job = submit().json()
    decide(sources=2 * DAY)
    cancel(api, job)
    assert kept_seconds(look(api, job)) == (30 * DAY, DAY)


def test_a_source_that_is_not_ours_has_no_end(sessions: SessionFactory, api: TestClient, submit: Submit) -> None:
    job = submit().json()
    with sessions.begin() as session:
        session.execute(text("""UPDATE jobs SET source = source || '{"bucket": "elsewhere"}'"""))
    cancel(api, job)
    assert kept_seconds(look(api, job)) == (30 * DAY, None)


def test_an_upload_that_no_job_names_is_kept_as_long_as_a_source_would_be(
    api: TestClient, put_upload: Callable[..., str], decide: Callable[..., None]
) -> None:
    decide(sources=2 * DAY)
    upload = api.post(f"/v1/uploads/{put_upload()}/complete").json()
    created, expires = (datetime.fromisoformat(upload[name]) for name in ("created_at", "expires_at"))
    assert timedelta(days=2) <= expires - created < timedelta(days=2, minutes=1)


# --- sources go ----------------------------------------------------------------------------------------------------


def test_a_source_goes_before_the_result_and_leaves_it_whole(
    api: TestClient, submit: Submit, workbench: Workbench, sessions: SessionFactory, storage: Storage,
    housekeeping: Housekeeping, decide: Callable[..., None],
) -> None:  # fmt: skip
    decide(sources=DAY)
    job = submit().json()
    workbench.run()
    source = read_only(sessions, Job).source["key"]
    before = set(storage.list_keys(""))
    housekeeping.purge_sources()
    assert set(storage.list_keys("")) == before
    pass_by(sessions, "source_expires_at")
    for _ in range(2):
        housekeeping.purge_sources()
        assert set(storage.list_keys("")) == before - {source}
    assert api.get(job["links"]["result"]).json()["files"]
    assert look(api, job)["state"] == "succeeded"


@pytest.mark.parametrize("removed", [False, True])
def test_a_job_whose_source_was_kept_long_enough_cannot_be_retried(
    api: TestClient, submit: Submit, sessions: SessionFactory, housekeeping: Housekeeping, decide: Callable[..., None],
    *, removed: bool,
) -> None:  # fmt: skip
    decide(sources=DAY)
    job = submit().json()
    cancel(api, job)
    pass_by(sessions, "source_expires_at")
    if removed:
        housekeeping.purge_sources()
    problem(api.post(job["links"]["retry"]), 409, "source_removed")
    assert look(api, job)["state"] == "canceled"


def test_a_job_that_is_just_going_cannot_be_retried(api: TestClient, submit: Submit, sessions: SessionFactory) -> None:
    job = submit().json()
    cancel(api, job)
    pass_by(sessions, "expires_at")
    problem(api.post(job["links"]["retry"]), 409, "source_removed")


def test_a_batch_retries_the_jobs_that_have_their_source(
    api: TestClient, submit_batch: Submit, sessions: SessionFactory
) -> None:
    batch = submit_batch(2).json()
    api.post(batch["links"]["cancel"])
    with sessions.begin() as session:
        one = select(Job.id).limit(1).scalar_subquery()
        session.execute(update(Job).where(Job.id == one).values(source_expires_at=func.now()))
    assert api.post(batch["links"]["retry_failed"]).json()["jobs"] | {"total": 2} == {
        "total": 2, "queued": 1, "canceled": 1, "running": 0, "succeeded": 0, "failed": 0, "expired": 0,
    }  # fmt: skip


def test_a_retried_job_keeps_its_source_until_it_ends_again(
    api: TestClient, submit: Submit, sessions: SessionFactory, storage: Storage, housekeeping: Housekeeping,
    decide: Callable[..., None],
) -> None:  # fmt: skip
    decide(sources=DAY)
    job = submit().json()
    cancel(api, job)
    assert api.post(job["links"]["retry"]).json()["source"]["expires_at"] is None
    pass_by(sessions, "source_expires_at", "expires_at")
    housekeeping.purge_sources()
    assert storage.list_keys("") == [read_only(sessions, Job).source["key"]]
    cancel(api, job)
    assert kept_seconds(look(api, job)) == (30 * DAY, DAY)


# --- uploads that several jobs read --------------------------------------------------------------------------------


def test_an_upload_goes_with_the_last_of_the_jobs_that_read_it(
    api: TestClient, put_upload: Callable[..., str], submit_upload: Callable[..., Json], sessions: SessionFactory,
    storage: Storage, housekeeping: Housekeeping, decide: Callable[..., None],
) -> None:  # fmt: skip
    decide(sources=DAY)
    upload_id = put_upload()
    first, second = submit_upload(upload_id), submit_upload(upload_id)
    cancel(api, first)
    pass_by(sessions, "source_expires_at")

    def purge() -> int:
        housekeeping.purge_sources()
        housekeeping.purge_uploads()
        return len(storage.list_keys(""))

    assert purge() == 1, "the second job has not ended"
    problem(api.post(first["links"]["retry"]), 409, "source_removed")
    cancel(api, second)
    assert purge() == 1, "the second job may be retried"
    assert api.post(second["links"]["retry"]).status_code == 202
    assert purge() == 1
    cancel(api, second)
    pass_by(sessions, "source_expires_at")
    assert purge() == 0
    assert (count_rows(sessions, Upload), count_rows(sessions, Job)) == (0, 2)


def test_a_job_whose_upload_was_deleted_cannot_be_retried(
    api: TestClient, submit_upload: Callable[..., Json], sessions: SessionFactory, housekeeping: Housekeeping
) -> None:
    job = submit_upload()
    upload = f"/v1/uploads/{read_only(sessions, Upload).id}"
    assert api.delete(upload).status_code == 204
    housekeeping.purge_uploads()
    assert count_rows(sessions, Upload) == 1, "the job reads it"
    cancel(api, job)
    problem(api.post(job["links"]["retry"]), 409, "source_removed")
    housekeeping.purge_uploads()
    assert count_rows(sessions, Upload) == 0
    problem(api.post(job["links"]["retry"]), 409, "source_removed")


def test_an_upload_whose_time_passed_since_it_was_looked_at_makes_no_job(
    submit_upload: Callable[..., Json], sessions: SessionFactory, tenant: Tenant
) -> None:
    """Between a look at the source and the commit of the job, which may take long for a batch."""
    submit_upload()
    upload_id = read_only(sessions, Upload).id
    with sessions.begin() as submitting:
        submitting.execute(select(func.now()))
        with sessions.begin() as meanwhile:
            meanwhile.execute(update(Upload).values(expires_at=func.now()))
        with pytest.raises(NotFound):
            retention.hold_uploads(submitting, [upload_id])
        with pytest.raises(NotFound):
            intake.submit(submitting, new_job(tenant, upload_id=upload_id), steps=[(StepKind.INFER, GPU)])
    assert count_rows(sessions, Job) == 1


def test_an_upload_is_not_taken_from_a_job_that_is_just_submitted(
    put_upload: Callable[..., str], api: TestClient, sessions: SessionFactory, storage: Storage,
    housekeeping: Housekeeping, tenant: Tenant,
) -> None:  # fmt: skip
    api.post(f"/v1/uploads/{put_upload()}/complete")
    upload_id = read_only(sessions, Upload).id
    with sessions.begin() as submitting:
        intake.submit(submitting, new_job(tenant, upload_id=upload_id), steps=[(StepKind.INFER, GPU)])
        with sessions.begin() as meanwhile:
            meanwhile.execute(text("UPDATE uploads SET expires_at = now() - interval '1 second'"))
        housekeeping.purge_uploads()
    housekeeping.purge_uploads()
    assert len(storage.list_keys("")) == 1
