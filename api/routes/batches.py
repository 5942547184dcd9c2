"""Batches: many jobs submitted, watched, canceled, retried and deleted as one. Their moves are `shared/batches.py`."""

import uuid
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from api import acceptance, idempotency, pages
from api.deps import Built, CurrentTenant
from api.errors import describe_problems
from api.schemas import BatchPage, NewBatch
from api.submissions import digest
from shared import batches, tally
from shared.contract import Batch, describe_batch
from shared.errors import NotFound
from shared.models import Batch as BatchRow
from shared.tenants import Caller

router = APIRouter(prefix="/v1/batches", tags=["batches"])

POLL_AFTER_SECONDS = 5
SECONDS_PER_ITEM = 0.05  # that looking at an upload may take when the storage is slow


@router.post("", status_code=202, responses=describe_problems(401, 403, 404, 409, 413, 422, 429, 503))
def submit_batch(
    wanted: NewBatch,
    response: Response,
    resources: Built,
    tenant: CurrentTenant,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Batch:
    """One job for every item, or for every object under a prefix: all of them or none. The refusal names the items that
    are wrong."""
    batch = idempotency.answer_once(
        resources, tenant, idempotency.parse_key(idempotency_key) if idempotency_key is not None else None,
        digest=partial(digest, wanted), extra_seconds=SECONDS_PER_ITEM * len(wanted.items or ()),
        accept=lambda hold: acceptance.accept_batch(resources, tenant, wanted, hold),
        recall=lambda session, batch_id: _read(session, tenant, batch_id),
    )  # fmt: skip
    response.headers["Location"] = batch.links.self
    response.headers["Retry-After"] = str(POLL_AFTER_SECONDS)
    return batch


@router.get("", responses=describe_problems(401, 422, 503))
def list_batches(
    resources: Built,
    tenant: CurrentTenant,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> BatchPage:
    """Newest first; pass `next_cursor` back as `cursor` for the page after."""
    wanted = select(BatchRow).where(BatchRow.tenant_id == tenant.id, BatchRow.deleted_at.is_(None))
    if cursor is not None:
        wanted = wanted.where(tuple_(BatchRow.created_at, BatchRow.id) < pages.read_cursor(cursor))
    with resources.sessions() as session:
        newest = wanted.order_by(BatchRow.created_at.desc(), BatchRow.id.desc())
        rows = list(session.scalars(newest.limit(limit + 1)))
        totals = tally.sum_up(session, rows[:limit])
    return BatchPage(
        items=[describe_batch(row, totals[row.id]) for row in rows[:limit]],
        next_cursor=pages.next_cursor(rows, limit=limit),
    )


@router.get("/{batch_id}", responses=describe_problems(401, 404, 422, 503))
def get_batch(batch_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Batch:
    with resources.sessions() as session:
        return _read(session, tenant, batch_id)


@router.post("/{batch_id}/cancel", status_code=202, responses=describe_problems(401, 404, 422, 503))
def cancel_batch(batch_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Batch:
    """Cancels every job that has not ended, as `cancel` of a job does; of a completed batch it changes nothing."""
    with resources.sessions() as session:
        _find(session, tenant, batch_id)
    batches.cancel(resources.sessions, batch_id)
    resources.hints.wake_sender()
    with resources.sessions() as session:
        return _read(session, tenant, batch_id)


@router.post("/{batch_id}/retry-failed", status_code=202, responses=describe_problems(401, 404, 422, 503))
def retry_failed(batch_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> Batch:
    """Every failed, canceled or expired job again, from where it stopped; a completed batch runs again and will be
    completed, and tell of it, once more."""
    with resources.sessions.begin() as session:
        _find(session, tenant, batch_id)
        woken = batches.retry_failed(session, batch_id)
    for step in woken[: acceptance.WOKEN_AT_ONCE]:
        resources.hints.wake(step.queue, step.id)
    with resources.sessions() as session:
        return _read(session, tenant, batch_id)


@router.delete("/{batch_id}", status_code=204, responses=describe_problems(401, 404, 422, 503))
def delete_batch(batch_id: uuid.UUID, resources: Built, tenant: CurrentTenant) -> None:
    """The batch with all its jobs and their files, finished or not. Jobs that run are canceled first, and are to be
    seen until their workers have let go of them; the bytes follow within seconds."""
    with resources.sessions.begin() as session:
        _find(session, tenant, batch_id).deleted_at = func.now()
    batches.delete_jobs(resources.sessions, batch_id)
    resources.hints.wake_sender()


def _read(session: Session, tenant: Caller, batch_id: uuid.UUID) -> Batch:
    row = _find(session, tenant, batch_id)
    return describe_batch(row, tally.sum_up(session, [row])[row.id])


def _find(session: Session, tenant: Caller, batch_id: uuid.UUID) -> BatchRow:
    """Raises NotFound, for another tenant's batch too."""
    mine = BatchRow.id == batch_id, BatchRow.tenant_id == tenant.id
    row = session.scalar(select(BatchRow).where(*mine, BatchRow.deleted_at.is_(None)))
    if row is None:
        raise NotFound("there is no such batch")
    return row
