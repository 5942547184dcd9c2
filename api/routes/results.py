"""What came of a job: its events as they happen, its manifest, its files. Links are signed at every read."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy import select

from api.deps import Built, CurrentTenant, Resources
from api.errors import InvalidRequest, describe_problems
from api.routes.jobs import find_job
from shared.contract import describe_job
from shared.errors import NotFound, NotReady
from shared.models import Job, JobEvent
from shared.tenants import Caller

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["results"])

WATCH_SECONDS = 0.25
LONGEST_EVENT_ID = 18  # digits of a 64-bit number that are always safe
MANIFEST_BYTES = 64 * 2**20
INDEX_BYTES = 2**30


def find_resume_point(
    job_id: uuid.UUID,
    resources: Built,
    tenant: CurrentTenant,
    last_event_id: Annotated[str | None, Header()] = None,
) -> int:
    """The last event the client has seen, 0 for none. Refuses here, since a stream that has begun cannot."""
    with resources.sessions.autocommit() as session:
        find_job(session, tenant, job_id)
    if last_event_id is None:
        return 0
    if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > LONGEST_EVENT_ID:
        raise InvalidRequest("Last-Event-ID is not one that this service gave out")
    return int(last_event_id)


@router.get("/events", response_class=EventSourceResponse, responses=describe_problems(401, 404, 422, 503))
async def follow_job(
    job_id: uuid.UUID, resources: Built, tenant: CurrentTenant, seen: Annotated[int, Depends(find_resume_point)]
) -> AsyncIterator[ServerSentEvent]:
    """`state`, `progress` and `attempt` events, then `completed` with the whole job; resumes by Last-Event-ID."""
    while True:
        job, events = await run_in_threadpool(_read_events, resources, tenant, job_id, seen)
        for event in events:
            seen = event.id
            yield ServerSentEvent(event=event.type, id=str(event.id), data={**event.data, "at": event.created_at})
        if job.state.is_terminal:
            yield ServerSentEvent(event="completed", id=str(seen), data=describe_job(job).model_dump(mode="json"))
            return
        await asyncio.sleep(WATCH_SECONDS)


@router.get("/result", responses=describe_problems(401, 404, 409, 422, 503))
def get_result(job_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> dict[str, Any]:
    """The manifest, each file with a fresh signed link."""
    manifest = _read_manifest(resources, tenant, job_id)
    files = [
        {**{name: value for name, value in file.items() if name != "key"}, "url": resources.storage.link(file["key"])}
        for file in manifest["files"]
    ]
    return {**manifest, "files": files, "links_expire_in_seconds": resources.settings.storage.link_seconds}


@router.get(
    "/files/{name}",
    status_code=307,
    response_class=RedirectResponse,
    responses=describe_problems(401, 404, 409, 422, 503),
)
def get_file(job_id: uuid.UUID, name: str, resources: Built, tenant: CurrentTenant) -> RedirectResponse:
    for file in _read_manifest(resources, tenant, job_id)["files"]:
        if file["name"] == name:
            return RedirectResponse(resources.storage.link(file["key"], filename=name), status_code=307)
    raise NotFound("the result has no file of that name")


@router.get(
    "/frames/{number}.png",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **describe_problems(401, 404, 409, 422, 503)},
)
def get_frame(
    job_id: uuid.UUID, number: Annotated[int, Path(ge=0)], resources: Built, tenant: CurrentTenant
) -> Response:
    """One mask of a recording, by the number of its frame in the source: a PNG as an image's mask is."""
    files = {file["name"]: file for file in _read_manifest(resources, tenant, job_id)["files"]}
    with resources.sessions.autocommit() as session:
        recording = find_job(session, tenant, job_id).recording
    if recording is None or "masks.mkv" not in files:
        raise NotFound("the result has no masks of a recording")
    # They bring NumPy and FFmpeg. Nothing but files of our own is read here.
    from shared.inference.mask_video import read_mask
    from shared.inference.masks import encode_mask
    from shared.inference.recording import Index

    index = Index.from_bytes(resources.storage.read(recording["index_key"], limit_bytes=INDEX_BYTES))
    video = files["masks.mkv"]
    etag = resources.storage.head(video["key"]).etag
    with resources.storage.open(video["key"], etag=etag, size_bytes=video["size"]) as source:
        try:
            _, _, mask = read_mask(source, pts=int(index.times[number]))
        except LookupError as error:
            raise NotFound("the recording has no such frame, or it was none of those processed") from error
    return Response(encode_mask(mask), media_type="image/png")


def _read_manifest(resources: Resources, tenant: Caller, job_id: uuid.UUID) -> dict[str, Any]:
    with resources.sessions.autocommit() as session:
        job = find_job(session, tenant, job_id)
    if job.manifest_key is None:
        raise NotReady(f"the job is {job.state}; it has no result")
    manifest: dict[str, Any] = json.loads(resources.storage.read(job.manifest_key, limit_bytes=MANIFEST_BYTES))
    return manifest


def _read_events(resources: Resources, tenant: Caller, job_id: uuid.UUID, seen: int) -> tuple[Job, list[JobEvent]]:
    """The job is read first: had it ended by then, the events that follow are complete."""
    with resources.sessions.autocommit() as session:
        job = find_job(session, tenant, job_id)
        wanted = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > seen).order_by(JobEvent.id)
        return job, list(session.scalars(wanted))
