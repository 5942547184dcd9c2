"""Accepting jobs, one or a batch: what their sources are first, then one transaction for the rows, only then hints.

A death before the commit leaves nothing that a reader sees; after it, upkeep sends the hints.
"""

import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from sqlalchemy.orm import Session

from api import idempotency
from api.deps import Resources
from api.idempotency import Hold
from api.schemas import NewBatch
from api.sources import Source, list_prefix, look_at, look_at_items, store_file
from api.submissions import SentFile, Submission
from shared import faults, intake, retention, tally
from shared.config import Jobs
from shared.contract import Batch, Job, describe_batch, describe_job
from shared.egress import check_url, reach_of_webhooks
from shared.models import Batch as BatchRow
from shared.models import Job as JobRow
from shared.models import Upload, create_id
from shared.sources import FIRST_STEPS
from shared.tenants import Caller

WOKEN_AT_ONCE = 64  # more workers than that are woken by upkeep, within seconds


def accept_job(
    resources: Resources,
    asking: Session,
    tenant: Caller,
    submission: Submission,
    hold: Hold | None,
    *,
    upload: Upload | None = None,
) -> Job:
    """By `asking`, whose statements are transactions of their own, unless there is a key to settle along with the job.

    `upload` is the one that the submission names, if there is such a one. Raises what may be wrong with the source
    (`api/sources.py`); AddressRefused, of the webhook; QueueFull; IdempotencyConflict; StorageUnavailable.
    """
    resources.backlog.admit(1)
    job_id = create_id()
    wanted = submission.wanted
    _check_webhook(resources, wanted.webhook_url)
    if isinstance(submission.source, SentFile):
        source = store_file(resources, tenant, job_id, submission.source, wanted)
    else:
        source = look_at(resources, asking, tenant, submission.source, wanted, upload)
    row = JobRow(
        id=job_id, tenant_id=tenant.id, mode=wanted.mode, options=wanted.options.model_dump(mode="json"),
        details=wanted.metadata, priority=wanted.priority, webhook_url=wanted.webhook_url,
        **_describe_source(source), **_describe_limits(resources.settings.jobs, tenant),
    )  # fmt: skip
    with nullcontext(asking) if hold is None else resources.sessions.begin() as session:
        [step] = intake.submit(session, row, steps=[FIRST_STEPS[source.kind]])
        if hold is not None:
            idempotency.settle(session, hold, job_id=job_id)
            faults.reach("job-uncommitted")
    faults.reach("job-committed")
    resources.hints.wake(step.queue, step.id)
    return describe_job(row)


def accept_batch(resources: Resources, tenant: Caller, wanted: NewBatch, hold: Hold | None) -> Batch:
    """All of the jobs or none. Raises RequestValidationError that names the items which are wrong; else as accept_job.

    The jobs have no webhook of their own: the batch tells of their end.
    """
    _check_webhook(resources, wanted.webhook_url)
    if wanted.prefix is not None:
        sources = list_prefix(resources, tenant, wanted.prefix, wanted)
        resources.backlog.admit(len(sources))
        details: list[dict[str, Any]] = [{}] * len(sources)
    else:
        resources.backlog.admit(len(wanted.items or []))
        sources = look_at_items(resources, tenant, wanted.items or [], wanted)
        details = [item.metadata for item in wanted.items or []]
    options = wanted.options.model_dump(mode="json")
    row = BatchRow(
        id=create_id(), tenant_id=tenant.id, name=wanted.name, mode=wanted.mode, options=options,
        details=wanted.metadata, priority=wanted.priority, webhook_url=wanted.webhook_url, jobs_left=len(sources),
    )  # fmt: skip
    jobs = [
        JobRow(
            id=create_id(), tenant_id=tenant.id, batch_id=row.id, mode=wanted.mode, options=options,
            details=told, priority=wanted.priority,
            **_describe_source(source), **_describe_limits(resources.settings.jobs, tenant),
        )
        for told, source in zip(details, sources, strict=True)
    ]  # fmt: skip
    with resources.sessions.begin() as session:
        retention.hold_uploads(session, _name_uploads(sources))
        session.add(row)
        session.flush()
        first_steps = [[FIRST_STEPS[source.kind]] for source in sources]
        steps = intake.submit_all(session, list(zip(jobs, first_steps, strict=True)))
        if hold is not None:
            idempotency.settle(session, hold, batch_id=row.id)
        session.refresh(row)
        batch = describe_batch(row, tally.sum_up(session, [row])[row.id])
    for step in steps[:WOKEN_AT_ONCE]:
        resources.hints.wake(step.queue, step.id)
    return batch


def _name_uploads(sources: Sequence[Source]) -> set[uuid.UUID]:
    return {each.upload_id for each in sources if each.upload_id is not None}


def _describe_source(source: Source) -> dict[str, Any]:
    return {"kind": source.kind, "upload_id": source.upload_id, "source": source.place}


def _describe_limits(limits: Jobs, tenant: Caller) -> dict[str, float | None]:
    policy = retention.read_policy(tenant, limits)
    return {
        "start_deadline_seconds": limits.start_deadline_seconds,
        "run_timeout_seconds": limits.run_timeout_seconds,
        "keep_seconds": policy.results_seconds,
        "keep_source_seconds": policy.sources_seconds,
    }


def _check_webhook(resources: Resources, url: str | None) -> None:
    if url is not None:
        check_url(url, reach_of_webhooks(resources.settings.webhooks))
