"""Jobs: submit, look, wait, cancel, retry, delete. What a job then goes through is `shared/lifecycle.py`."""

import asyncio
import re
import time
import uuid
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from api import acceptance, idempotency, pages
from api.deps import Built, Credentials, CurrentTenant, Resources, find_caller, find_caller_and_upload, get_tenant
from api.errors import InvalidRequest, describe_problems
from api.schemas import JobPage
from api.submissions import JSON, Submission, parse_json, read_form, read_json_body, read_kind
from shared import lifecycle, queue
from shared.contract import Job, JobKind, ModeName, describe_job
from shared.errors import NotFound
from shared.models import Job as JobRow
from shared.models import JobState, Upload
from shared.tenants import Caller

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

POLL_AFTER_SECONDS = 1
LONGEST_WAIT_SECONDS = 60
WATCH_SECONDS = 0.1

_SUBMIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "mode"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "mode": {"type": "string"},
                        "options": {"type": "string", "description": "JSON, as in the other form of this body"},
                        "webhook_url": {"type": "string", "format": "uri"},
                        "metadata": {"type": "string", "description": "a JSON object of your own"},
                        "priority": {"type": "integer"},
                        "expect": {"type": "string", "enum": ["image", "recording"]},
                    },
                }
            },
            "application/json": {"schema": {"$ref": "#/components/schemas/NewJob"}},
        },
    }
}


@router.post(
    "",
    status_code=202,
    response_model=Job,
    responses={
        200: {"model": Job, "description": "Finished within `Prefer: wait`"},
        **describe_problems(401, 403, 404, 409, 413, 422, 429, 503, 507),
    },
    openapi_extra=_SUBMIT_BODY,
)
async def submit_job(
    request: Request,
    resources: Built,
    credentials: Credentials,
    idempotency_key: Annotated[str | None, Header()] = None,
    prefer: Annotated[str | None, Header()] = None,
) -> Response:
    """Submit an image or a recording: as a file in a form, or in JSON as an upload, an object in S3 or a URL."""
    key = idempotency.parse_key(idempotency_key) if idempotency_key is not None else None
    wait_seconds = _parse_wait(prefer)
    limits = resources.settings.api
    if read_kind(request) == JSON:
        body = await read_json_body(request, limits)
        job = await run_in_threadpool(_accept_json, resources, credentials, body, key)
    else:
        tenant = await run_in_threadpool(get_tenant, resources, credentials)
        async with read_form(request, limits) as submission:
            job = await run_in_threadpool(_accept_form, resources, tenant, submission, key)
    if wait_seconds:
        job = await _watch_until_done(resources, job, seconds=wait_seconds)
    headers = {"Location": job.links.self}
    is_done = job.state.is_terminal and wait_seconds
    if not is_done:
        headers["Retry-After"] = str(POLL_AFTER_SECONDS)
    return Response(job.model_dump_json(), 200 if is_done else 202, headers, media_type=JSON)


@router.get("", responses=describe_problems(401, 422, 503))
def list_jobs(
    resources: Built,
    tenant: CurrentTenant,
    state: JobState | None = None,
    mode: ModeName | None = None,
    kind: JobKind | None = None,
    batch_id: uuid.UUID | None = None,
    created_after: datetime | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> JobPage:
    """Newest first; pass `next_cursor` back as `cursor` for the page after."""
    wanted = select(JobRow).where(JobRow.tenant_id == tenant.id, JobRow.deleted_at.is_(None))
    for column, value in ((JobRow.state, state), (JobRow.mode, mode), (JobRow.kind, kind), (JobRow.batch_id, batch_id)):
        if value is not None:
            wanted = wanted.where(column == value)
    if created_after is not None:
        if created_after.tzinfo is None:
            raise InvalidRequest("created_after needs a time zone, as in 2026-01-31T12:00:00Z")
        wanted = wanted.where(JobRow.created_at > created_after)
    if cursor is not None:
        wanted = wanted.where(tuple_(JobRow.created_at, JobRow.id) < pages.read_cursor(cursor))
    with resources.sessions.autocommit() as session:
        rows = list(session.scalars(wanted.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit + 1)))
    return JobPage(items=[describe_job(row) for row in rows[:limit]], next_cursor=pages.next_cursor(rows, limit=limit))


@router.get("/{job_id}", responses=describe_problems(401, 404, 422, 503))
def get_job(job_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Job:
    with resources.sessions.autocommit() as session:
        row = find_job(session, tenant, job_id)
        return describe_job(row, queue_position=queue.find_position(session, row))


@router.post("/{job_id}/cancel", status_code=202, responses=describe_problems(401, 404, 409, 422, 503))
def cancel_job(job_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Job:
    """Ends a queued job at once; a running one stops at its worker's next heartbeat."""
    with resources.sessions.begin() as session:
        find_job(session, tenant, job_id)
        job = describe_job(lifecycle.request_cancel(session, job_id))
    resources.hints.wake_sender()
    return job


@router.post("/{job_id}/retry", status_code=202, responses=describe_problems(401, 404, 409, 422, 503))
def retry_job(job_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Job:
    """The same job again, from where it stopped: finished steps are kept."""
    with resources.sessions.begin() as session:
        find_job(session, tenant, job_id)
        row, woken = lifecycle.retry(session, job_id)
    for step in woken:
        resources.hints.wake(step.queue, step.id)
    return describe_job(row)


@router.delete("/{job_id}", status_code=204, responses=describe_problems(401, 404, 409, 422, 503))
def delete_job(job_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> None:
    """The job and its files are gone for every reader at once; the bytes follow within seconds."""
    with resources.sessions.begin() as session:
        find_job(session, tenant, job_id)
        lifecycle.delete_job(session, job_id)


def find_job(session: Session, tenant: Caller, job_id: uuid.UUID) -> JobRow:
    """Raises NotFound, for another tenant's job too."""
    row = session.scalar(
        select(JobRow).where(JobRow.id == job_id, JobRow.tenant_id == tenant.id, JobRow.deleted_at.is_(None))
    )
    if row is None:
        raise NotFound("there is no such job")
    return row


def _accept_json(resources: Resources, credentials: Credentials, body: bytes, key: str | None) -> Job:
    """All of it in one thread and one session, who asks and the upload in one question: another one of any of these
    takes as long as all the rest."""
    with resources.sessions.autocommit() as asking:
        try:
            submission = parse_json(body)
        except RequestValidationError:
            find_caller(asking, credentials)  # who is nobody hears that alone
            raise
        upload_id = submission.upload_id
        if upload_id is None:
            return _accept_once(resources, asking, find_caller(asking, credentials), submission, key)
        tenant, upload = find_caller_and_upload(asking, credentials, upload_id)
        return _accept_once(resources, asking, tenant, submission, key, upload=upload)


def _accept_form(resources: Resources, tenant: Caller, submission: Submission, key: str | None) -> Job:
    with resources.sessions.autocommit() as asking:
        return _accept_once(resources, asking, tenant, submission, key)


def _accept_once(
    resources: Resources,
    asking: Session,
    tenant: Caller,
    submission: Submission,
    key: str | None,
    *,
    upload: Upload | None = None,
) -> Job:
    return idempotency.answer_once(
        resources, tenant, key, digest=submission.digest,
        accept=lambda hold: acceptance.accept_job(resources, asking, tenant, submission, hold, upload=upload),
        recall=lambda session, job_id: describe_job(find_job(session, tenant, job_id)),
    )  # fmt: skip


def _parse_wait(prefer: str | None) -> float:
    """Seconds of RFC 7240's `wait`, at most LONGEST_WAIT_SECONDS; preferences we do not know are ignored."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?(?:$|[,;\s])", prefer or "")
    return min(int(found.group(1)), LONGEST_WAIT_SECONDS) if found else 0


async def _watch_until_done(resources: Resources, job: Job, *, seconds: float) -> Job:
    deadline = time.monotonic() + seconds
    while not job.state.is_terminal and time.monotonic() < deadline:
        await asyncio.sleep(WATCH_SECONDS)
        job = await run_in_threadpool(_look_again, resources, job.id)
    return job


def _look_again(resources: Resources, job_id: uuid.UUID) -> Job:
    with resources.sessions.autocommit() as session:
        row = session.get(JobRow, job_id)
        if row is None:
            raise NotFound("the job was deleted")
        return describe_job(row)
