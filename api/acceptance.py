"""Accepting jobs, one or a batch: what their sources are first, then one transaction for the rows, only then hints.

A death before the commit leaves nothing that a reader sees; after it, upkeep sends the hints.
"""

import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from sqlalchemy import func, select

from api import idempotency
from api.deps import Resources
from api.errors import InvalidRequest
from api.idempotency import Hold
from api.kinds import tell_kind
from api.routes.uploads import find_complete_upload
from api.schemas import NewBatch
from api.submissions import SentFile, Submission
from shared import lifecycle, tally
from shared.broker import GPU, IO
from shared.config import Jobs
from shared.contract import Batch, Frames, Job, JobKind, Options, describe_batch, describe_job
from shared.errors import NotFound, SourceChanged, SourceMissing, UploadIncomplete
from shared.inference.signatures import HEAD_BYTES
from shared.models import Batch as BatchRow
from shared.models import Job as JobRow
from shared.models import StepKind, Tenant, Upload, create_id
from shared.storage import source_key

FIRST_STEPS: dict[JobKind, tuple[StepKind, str]] = {
    "image": (StepKind.INFER, GPU),
    "recording": (StepKind.PROBE, IO),
}
LOOKERS = 8  # uploads of a batch that are looked at together; fewer than either pool has connections
WOKEN_AT_ONCE = 64  # more workers than that are woken by upkeep, within seconds


@dataclass(frozen=True, kw_only=True)
class Source:
    kind: JobKind
    upload_id: uuid.UUID | None
    place: dict[str, Any]
    """As the job's row keeps it."""


Item = TypeVar("Item", Upload, Source)


def accept_job(resources: Resources, tenant: Tenant, submission: Submission, hold: Hold | None) -> Job:
    """Raises NotFound and UploadIncomplete for the upload, InvalidRequest, IdempotencyConflict, StorageUnavailable."""
    job_id = create_id()
    wanted = submission.wanted
    if isinstance(submission.source, SentFile):
        source = _store_file(resources, tenant, job_id, submission.source, wanted.options)
    else:
        upload = find_complete_upload(resources, tenant, submission.source)
        source = _look_at_upload(resources, upload, wanted.options)
    row = JobRow(
        id=job_id, tenant_id=tenant.id, mode=wanted.mode, options=wanted.options.model_dump(mode="json"),
        details=wanted.metadata, priority=wanted.priority, webhook_url=wanted.webhook_url,
        **_describe_source(source), **_describe_limits(resources.settings.jobs),
    )  # fmt: skip
    with resources.sessions.begin() as session:
        [step] = lifecycle.submit(session, row, steps=[FIRST_STEPS[source.kind]])
        if hold is not None:
            idempotency.settle(session, hold, job_id=job_id)
        job = describe_job(row)
    resources.hints.wake(step.queue, step.id)
    return job


def accept_batch(resources: Resources, tenant: Tenant, wanted: NewBatch, hold: Hold | None) -> Batch:
    """All of the jobs or none. Raises RequestValidationError that names the items which are wrong; else as accept_job.

    The jobs have no webhook of their own: the batch tells of their end.
    """
    sources = _look_at_items(resources, tenant, wanted)
    options = wanted.options.model_dump(mode="json")
    row = BatchRow(
        id=create_id(), tenant_id=tenant.id, name=wanted.name, mode=wanted.mode, options=options,
        details=wanted.metadata, priority=wanted.priority, webhook_url=wanted.webhook_url, jobs_left=len(sources),
    )  # fmt: skip
    jobs = [
        JobRow(
            id=create_id(), tenant_id=tenant.id, batch_id=row.id, mode=wanted.mode, options=options,
            details=item.metadata, priority=wanted.priority,
            **_describe_source(source), **_describe_limits(resources.settings.jobs),
        )
        for item, source in zip(wanted.items, sources, strict=True)
    ]  # fmt: skip
    with resources.sessions.begin() as session:
        session.add(row)
        session.flush()
        first_steps = [[FIRST_STEPS[source.kind]] for source in sources]
        steps = lifecycle.submit_all(session, list(zip(jobs, first_steps, strict=True)))
        if hold is not None:
            idempotency.settle(session, hold, batch_id=row.id)
        session.refresh(row)
        batch = describe_batch(row, tally.sum_up(session, [row])[row.id])
    for step in steps[:WOKEN_AT_ONCE]:
        resources.hints.wake(step.queue, step.id)
    return batch


def _describe_source(source: Source) -> dict[str, Any]:
    return {"kind": source.kind, "upload_id": source.upload_id, "source": source.place}


def _describe_limits(limits: Jobs) -> dict[str, float]:
    return {
        "start_deadline_seconds": limits.start_deadline_seconds,
        "run_timeout_seconds": limits.run_timeout_seconds,
        "keep_seconds": limits.keep_seconds,
    }


def _store_file(resources: Resources, tenant: Tenant, job_id: uuid.UUID, file: SentFile, options: Options) -> Source:
    """Nothing is stored if the options do not suit the file."""
    head = file.body.read(HEAD_BYTES)
    file.body.seek(0)
    kind = _tell_kind(options, head, filename=file.name, content_type=file.content_type)
    key = source_key(tenant.id, job_id)
    stored = resources.storage.put(key, file.body, content_type=file.content_type)
    place = {"key": key, "etag": stored.etag, "size_bytes": stored.size_bytes, "filename": file.name}
    return Source(kind=kind, upload_id=None, place=place)


def _look_at_upload(resources: Resources, upload: Upload, options: Options) -> Source:
    head = resources.storage.read(upload.storage_key, etag=upload.etag, limit_bytes=HEAD_BYTES)
    kind = _tell_kind(options, head, filename=upload.filename, content_type=upload.content_type)
    place = {"key": upload.storage_key, "etag": upload.etag, "size_bytes": upload.size_bytes}
    return Source(kind=kind, upload_id=upload.id, place={**place, "filename": upload.filename})


def _tell_kind(options: Options, head: bytes, *, filename: str, content_type: str) -> JobKind:
    kind = tell_kind(head, filename=filename, content_type=content_type)
    if kind == "image" and options.frames != Frames():
        raise InvalidRequest("an image has no frames to choose from: leave options.frames out")
    if kind == "image" and options.smooth:
        raise InvalidRequest("an image has no frames before it to smooth it with: leave options.smooth out")
    return kind


# --- the items of a batch ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """What keeps one item from becoming a job."""

    rule: str
    detail: str


def _look_at_items(resources: Resources, tenant: Tenant, wanted: NewBatch) -> list[Source]:
    """The rows of all before the bytes of any: what the database knows to be wrong costs no call to the storage."""
    ids = [item.source.upload_id for item in wanted.items]
    with resources.sessions() as session:
        mine = select(Upload).where(Upload.id.in_(ids), Upload.tenant_id == tenant.id, Upload.expires_at > func.now())
        uploads = {upload.id: upload for upload in session.scalars(mine)}
    first_items: dict[uuid.UUID, int] = {}
    listed: list[Upload | Wrong] = []
    for number, upload_id in enumerate(ids):
        first = first_items.setdefault(upload_id, number)
        if first != number:
            listed.append(Wrong(rule="duplicate", detail=f"item {first} has the same upload"))
        else:
            listed.append(uploads.get(upload_id) or Wrong(rule=NotFound.code, detail="there is no such upload"))
    rows = _refuse_wrong(listed)
    with ThreadPoolExecutor(LOOKERS, thread_name_prefix="look") as pool:
        return _refuse_wrong(list(pool.map(partial(_look_at_item, resources, tenant, wanted.options), rows)))


def _look_at_item(resources: Resources, tenant: Tenant, options: Options, upload: Upload) -> Source | Wrong:
    try:
        if upload.etag is None:
            upload = find_complete_upload(resources, tenant, upload.id)
        return _look_at_upload(resources, upload, options)
    except (NotFound, UploadIncomplete, SourceMissing, SourceChanged, InvalidRequest) as error:
        return Wrong(rule=error.code, detail=str(error))


def _refuse_wrong(items: Sequence[Item | Wrong]) -> list[Item]:
    """Raises RequestValidationError that names the items which are wrong."""
    wrong = [(number, item) for number, item in enumerate(items) if isinstance(item, Wrong)]
    if wrong:
        raise RequestValidationError(
            [
                {"loc": ("body", "items", number, "source", "upload_id"), "msg": item.detail, "type": item.rule}
                for number, item in wrong
            ]
        )
    return [item for item in items if not isinstance(item, Wrong)]
