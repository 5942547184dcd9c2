"""The sweep removes what nothing names, once it is old enough, and never anything else."""

import threading
import time
import uuid
from collections.abc import Callable

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from shared import lifecycle
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Batch, JobEvent, JobState, Tenant, Upload, create_id
from shared.multipart import SMALLEST_PART_BYTES
from shared.s3 import create_client
from shared.storage import Storage, attempt_prefix, job_prefix, source_key, upload_key
from tests.integration.commits import watched_commits
from tests.integration.conftest import (
    BAD_MEDIA,
    MODEL,
    TIMING,
    MakeJob,
    Submit,
    Take,
    changed,
    count_rows,
    read_job,
    read_only,
    told,
    twice,
)
from tests.integration.workbench import Workbench
from worker import sweep as sweeping
from worker.sweep import LOCK, Sweep


@pytest.fixture
def sweep(settings: Settings, sessions: SessionFactory, storage: Storage) -> Sweep:
    """One to which nothing is too young."""
    return Sweep(settings=changed(settings, "upkeep", sweep_grace_seconds=-60), sessions=sessions, storage=storage)


@pytest.fixture
def put(storage: Storage, tenant: Tenant) -> Callable[..., str]:
    """A file of the tenant under test; gives its key."""

    def store(key: str) -> str:
        storage.put(key, b"bytes", content_type="image/png")
        return key

    return store


def once(sweep: Sweep, sessions: SessionFactory) -> None:
    """However lately all tenants were swept."""
    with sessions.begin() as session:
        session.execute(update(Tenant).values(swept_at=None))
    sweep.sweep()


def begun(storage: Storage) -> list[str]:
    """Keys of what is brought in parts and is not complete."""
    return [each.key for page in storage.multipart.list_begun("") for each in page]


# --- what goes -----------------------------------------------------------------------------------------------------


def test_the_files_of_a_job_that_never_came_to_be_go(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, tenant: Tenant, put: Callable[..., str]
) -> None:
    """A form's file was stored, and the job's transaction failed."""
    put(source_key(tenant.id, create_id()))
    put(upload_key(tenant.id, create_id()))
    for _ in range(2):
        once(sweep, sessions)
        assert storage.list_keys("") == []


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED, JobState.EXPIRED])
def test_what_a_dead_attempt_stored_goes_once_its_job_has_ended(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, job_in: MakeJob, put: Callable[..., str], state: JobState
) -> None:
    job = job_in(state)
    left = put(f"{attempt_prefix(job.tenant_id, job.id, ordinal=0, attempt=7)}mask.png")
    if state == JobState.SUCCEEDED:
        manifest = f"{attempt_prefix(job.tenant_id, job.id, ordinal=0, attempt=8)}manifest.json"
        storage.put(manifest, b'{"files": []}', content_type="application/json")
        with sessions.begin() as session:
            session.execute(text("UPDATE jobs SET manifest_key = :key"), {"key": manifest})
    once(sweep, sessions)
    assert left not in storage.list_keys("")


def test_parts_that_nobody_will_complete_are_given_up(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, tenant: Tenant, job_in: MakeJob
) -> None:
    ended = job_in(JobState.FAILED)
    for key in (upload_key(tenant.id, create_id()), f"{job_prefix(tenant.id, ended.id)}big"):
        storage.multipart.begin(key, content_type="video/mp4")
    once(sweep, sessions)
    assert begun(storage) == []


def test_progress_of_ended_jobs_is_forgotten_and_what_became_of_them_is_not(
    sweep: Sweep, sessions: SessionFactory, job_in: MakeJob, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "JOBS_AT_ONCE", 1)
    for job in (job_in(JobState.FAILED), job_in(JobState.CANCELED), make_job()):
        with sessions.begin() as session:
            session.add_all([JobEvent(job_id=job.id, type="progress", data={}) for _ in range(3)])
    before = told(sessions, "state"), told(sessions, "attempt")
    once(sweep, sessions)
    assert (told(sessions, "state"), told(sessions, "attempt")) == before
    with sessions() as session:
        left = session.scalars(select(JobEvent.job_id).where(JobEvent.type == "progress"))
        assert left.all() == [job.id] * 3, "of the one that goes on"


def test_a_batch_that_was_left_behind_by_its_jobs_goes(
    sweep: Sweep, sessions: SessionFactory, submit_batch: Submit
) -> None:
    kept = submit_batch(1).json()
    submit_batch(1)
    with sessions.begin() as session:
        session.execute(text("DELETE FROM jobs WHERE batch_id <> :kept"), {"kept": kept["id"]})
    once(sweep, sessions)
    assert str(read_only(sessions, Batch).id) == kept["id"]


# --- what stays ----------------------------------------------------------------------------------------------------


def test_nothing_that_is_young_goes(
    settings: Settings, sessions: SessionFactory, storage: Storage, tenant: Tenant
) -> None:
    client = create_client(settings.storage, settings.storage.endpoint_url)
    old, young = (source_key(tenant.id, create_id()) for _ in range(2))
    for key, hours in ((old, 25), (young, 23)):
        modified = str(time.time() - hours * 3600)  # which this storage takes from a header
        client.put_object(Bucket=settings.storage.bucket, Key=key, Body=b"bytes", Metadata={"mtime": modified})
    storage.multipart.begin(upload_key(tenant.id, create_id()), content_type="video/mp4")
    Sweep(settings=settings, sessions=sessions, storage=storage).sweep()
    assert storage.list_keys("") == [young]
    assert len(begun(storage)) == 1


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_nothing_of_a_job_that_has_not_ended_goes(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, job_in: MakeJob, put: Callable[..., str], state: JobState
) -> None:
    job = job_in(state)
    put(f"{attempt_prefix(job.tenant_id, job.id, ordinal=0, attempt=1)}mask.png")
    put(f"{attempt_prefix(job.tenant_id, job.id, ordinal=0, attempt=2)}mask.png")
    storage.multipart.begin(f"{job_prefix(job.tenant_id, job.id)}big", content_type="video/mp4")
    before = storage.list_keys("")
    once(sweep, sessions)
    assert storage.list_keys("") == before
    assert len(begun(storage)) == 1


def test_nothing_of_an_ended_job_goes_while_a_step_of_it_runs(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, make_job: MakeJob, take: Take,
    put: Callable[..., str],
) -> None:  # fmt: skip
    """It was retried while a worker had not yet heard that it had failed, say: what the worker stores may be named."""
    job = make_job(steps=2)
    failing, _running = take(), take()
    with sessions.begin() as session:
        lifecycle.fail_step(session, failing.lease, BAD_MEDIA, failed_attempts=3)
    kept = put(f"{attempt_prefix(job.tenant_id, job.id, ordinal=1, attempt=1)}mask.png")
    once(sweep, sessions)
    assert storage.list_keys("") == [kept]


def test_results_and_sources_stay(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, api: TestClient, submit: Submit, workbench: Workbench,
    put_upload: Callable[..., str],
) -> None:  # fmt: skip
    submit()
    api.post("/v1/jobs", json={"mode": "demo", "source": {"upload_id": put_upload()}})
    workbench.run()
    put_upload()
    before = storage.list_keys("")
    assert len(before) == 7, "three sources, two masks, two manifests"
    once(sweep, sessions)
    assert storage.list_keys("") == before


def test_what_any_row_or_manifest_names_stays_whichever_attempt_stored_it(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, make_job: MakeJob, put: Callable[..., str],
    tenant: Tenant, take: Take,
) -> None:  # fmt: skip
    """A recording whose parts were made by several attempts, and whose manifest names a file of yet another."""
    job_id = create_id()

    def key(ordinal: int, attempt: int, name: str) -> str:
        return put(f"{attempt_prefix(tenant.id, job_id, ordinal=ordinal, attempt=attempt)}{name}")

    named = [key(0, 1, "source"), key(1, 1, "index"), key(2, 3, "chunk.mkv"), key(3, 1, "joined.mkv")]
    job = make_job(id=job_id, source={"key": named[0], "etag": "e", "size_bytes": 5, "filename": "a.mkv"})
    lease = take().lease
    manifest_key = f"{attempt_prefix(tenant.id, job_id, ordinal=3, attempt=2)}manifest.json"
    storage.put(manifest_key, f'{{"files": [{{"key": "{named[3]}"}}]}}'.encode(), content_type="application/json")
    with sessions.begin() as session:
        lifecycle.publish(session, lease, manifest_key=manifest_key, model=MODEL, timing=TIMING)
        session.execute(
            text("UPDATE jobs SET recording = jsonb_build_object('index_key', CAST(:key AS text))"), {"key": named[1]}
        )
        session.execute(
            text("UPDATE steps SET result = jsonb_build_object('files', jsonb_build_array(CAST(:key AS text)))"),
            {"key": named[2]},
        )
    orphan = key(2, 2, "chunk.mkv")
    for each in (*named, manifest_key, orphan):
        assert each in storage.list_keys("")
    once(sweep, sessions)
    assert storage.list_keys("") == sorted([*named, manifest_key])
    assert read_job(sessions, job).state == JobState.SUCCEEDED


@pytest.mark.parametrize("manifest", [None, b"", b'{"files": ['])
def test_nothing_goes_of_a_job_whose_manifest_cannot_be_read(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, job_in: MakeJob, put: Callable[..., str],
    manifest: bytes | None,
) -> None:  # fmt: skip
    job = job_in(JobState.SUCCEEDED)
    if manifest is not None:
        storage.put(job.manifest_key or "", manifest, content_type="application/json")
    left = put(f"{attempt_prefix(job.tenant_id, job.id, ordinal=0, attempt=7)}mask.png")
    once(sweep, sessions)
    assert left in storage.list_keys("")


def test_an_upload_stays_in_bytes_and_parts_for_as_long_as_its_row(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, api: TestClient, settings: Settings,
    put_upload: Callable[..., str],
) -> None:  # fmt: skip
    put_upload()
    large = {"filename": "a.mp4", "size": settings.api.single_upload_bytes + SMALLEST_PART_BYTES}
    assert api.post("/v1/uploads", json=large).status_code == 201
    once(sweep, sessions)
    assert len(storage.list_keys("")) == 1
    assert len(begun(storage)) == 1
    assert count_rows(sessions, Upload) == 2


def test_what_is_not_known_to_be_ours_stays(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, tenant: Tenant, put: Callable[..., str]
) -> None:
    """Another program's files, and those of a database that this one is not."""
    put(f"tenants/{tenant.id}/notes.txt")
    put(f"tenants/{tenant.id}/jobs/{'-' * 36}/source")
    put(source_key(uuid.uuid4(), uuid.uuid4()))
    put("a file")
    before = storage.list_keys("")
    once(sweep, sessions)
    assert storage.list_keys("") == before


# --- one at a time, and on from where it stopped -------------------------------------------------------------------


def test_two_sweeps_at_once_are_one(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, tenant: Tenant, put: Callable[..., str]
) -> None:
    key = put(source_key(tenant.id, create_id()))
    with sessions.begin() as other:
        other.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        sweep.sweep()
        assert storage.list_keys("") == [key]
        other.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
    once(sweep, sessions)
    assert storage.list_keys("") == []


def test_sweeps_that_know_nothing_of_each_other_do_no_harm(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, tenant: Tenant, put: Callable[..., str], submit: Submit,
    workbench: Workbench,
) -> None:  # fmt: skip
    """As when one has lost its connection, and with it the lock, and does not know yet."""
    submit()
    workbench.run()
    before = storage.list_keys("")
    for _ in range(20):
        put(source_key(tenant.id, create_id()))
    both = [threading.Thread(target=sweep.sweep_tenant, args=(tenant,)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert storage.list_keys("") == before


def test_a_tenant_that_was_just_swept_is_left_alone(
    settings: Settings, sessions: SessionFactory, storage: Storage, tenant: Tenant
) -> None:
    sweep = Sweep(settings=settings, sessions=sessions, storage=storage)
    twice(sweep.sweep)
    first = read_only(sessions, Tenant).swept_at
    assert first is not None
    sweep.sweep()
    assert read_only(sessions, Tenant).swept_at == first


def test_a_sweep_that_died_is_finished_by_the_next(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, tenant: Tenant, put: Callable[..., str]
) -> None:
    put(source_key(tenant.id, create_id()))
    with watched_commits(sessions, lambda _: storage.list_keys("") == []), pytest.raises(OperationalError):
        sweep.sweep()
    assert read_only(sessions, Tenant).swept_at is None
    sweep.sweep()
    assert read_only(sessions, Tenant).swept_at is not None


def test_a_sweep_goes_on_where_the_last_one_stopped(
    sweep: Sweep, sessions: SessionFactory, storage: Storage, tenant: Tenant, put: Callable[..., str]
) -> None:
    keys = sorted(put(source_key(tenant.id, create_id())) for _ in range(3))
    with sessions.begin() as session:
        session.execute(update(Tenant).values(swept_to=keys[1]))
    once(sweep, sessions)
    assert storage.list_keys("") == keys[:2], "they were looked at before"
    once(sweep, sessions)
    assert storage.list_keys("") == []
