"""Jobs put into any state by the moves that lead there, on a real database."""

from collections.abc import Callable

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from shared import lifecycle
from shared.broker import GPU
from shared.contract import Failure, Options
from shared.db import SessionFactory
from shared.lifecycle import ClaimedStep, Lease
from shared.models import Job, JobState, Step, StepKind, Tenant, create_id

TIMING = {"frames": 1, "inference_seconds": 0.5}
MODEL = {"name": "a model", "revision": "1", "dtype": "float32", "input_size": [64, 64]}
TROUBLE = Failure(code="storage_unavailable", detail="the storage cannot be reached", retryable=True)
BAD_MEDIA = Failure(code="invalid_media", detail="not an image", retryable=False)

MakeJob = Callable[..., Job]


def new_job(tenant: Tenant, **values: object) -> Job:
    chosen: dict[str, object] = {
        "id": create_id(), "tenant_id": tenant.id, "kind": "image", "mode": "demo",
        "options": Options().model_dump(mode="json"), "details": {}, "priority": 0,
        "source": {"key": "a key", "etag": "an etag", "size_bytes": 10, "filename": "a.png"},
        "start_deadline_seconds": 60, "run_timeout_seconds": 60, "keep_seconds": 60,
    }  # fmt: skip
    return Job(**(chosen | values))


@pytest.fixture
def make_job(sessions: SessionFactory, tenant: Tenant) -> MakeJob:
    """Submit a job with as many gpu steps as asked for, one unless said otherwise."""

    def make(*, steps: int = 1, owner: Tenant = tenant, **values: object) -> Job:
        with sessions.begin() as session:
            job = new_job(owner, **values)
            lifecycle.submit(session, job, steps=[(StepKind.INFER, GPU)] * steps)
            return job

    return make


@pytest.fixture
def claim(sessions: SessionFactory) -> Callable[..., ClaimedStep | None]:
    def take(**values: object) -> ClaimedStep | None:
        chosen: dict[str, object] = {
            "worker_id": create_id(), "queue_name": GPU, "modes": ("demo", "fast", "sota"), "mode_loaded": None,
            "lease_seconds": 30,
        }  # fmt: skip
        with sessions.begin() as session:
            return lifecycle.claim(session, **(chosen | values))  # type: ignore[arg-type]

    return take


@pytest.fixture
def job_in(sessions: SessionFactory, make_job: MakeJob, claim: Callable[..., ClaimedStep | None]) -> MakeJob:
    """A job that got into the wanted state as a real one would."""

    def put(state: JobState) -> Job:
        job = make_job()
        if state == JobState.QUEUED:
            return job
        with sessions.begin() as session:
            if state == JobState.CANCELED:
                return lifecycle.request_cancel(session, job.id)
            if state == JobState.EXPIRED:
                make_late(session, "jobs", "start_by")
                expired = lifecycle.expire(session)
                assert expired is not None
                return expired
        claimed = claim()
        assert claimed is not None
        with sessions.begin() as session:
            if state == JobState.SUCCEEDED:
                lifecycle.publish(session, claimed.lease, manifest_key="a key", model=MODEL, timing=TIMING)
            if state == JobState.FAILED:
                lifecycle.fail_step(session, claimed.lease, BAD_MEDIA, failed_attempts=3)
        return read_job(sessions, job)

    return put


def make_late(session: Session, table: str, column: str) -> None:
    """What waiting would do, without the wait."""
    session.execute(text(f"UPDATE {table} SET {column} = now() - interval '1 second'"))  # noqa: S608 - names from tests


def read_job(sessions: SessionFactory, job: Job) -> Job:
    with sessions() as session:
        return session.scalars(select(Job).where(Job.id == job.id)).one()


def read_steps(sessions: SessionFactory, job: Job) -> list[Step]:
    with sessions() as session:
        return list(session.scalars(select(Step).where(Step.job_id == job.id).order_by(Step.ordinal)))


def older(lease: Lease) -> Lease:
    return Lease(step_id=lease.step_id, attempt=lease.attempt - 1)
