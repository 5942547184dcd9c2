"""What the jobs of a batch come to, and the end of the batch: with its last job, in the same transaction, once.

A batch counts down the jobs that have not ended. Its row is locked after the rows of its jobs (`shared/locks.py`), so
jobs that end at the same moment take turns here, and one of them alone finds that it is the last.
"""

import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import case, func, select, update
from sqlalchemy.orm import Session

from shared import webhooks
from shared.contract import BatchJobs, BatchProgress
from shared.models import Batch, Job, JobState

_ENDED = [state for state in JobState if state.is_terminal]


def count(session: Session, moved: Sequence[Job], to: JobState) -> None:
    """Count jobs that were moved `to` for their batches: the last to end finishes a batch, a retry reopens it."""
    moves = Counter(job.batch_id for job in moved if job.batch_id is not None)
    for batch_id in sorted(moves):
        if to.is_terminal:
            _count_down(session, batch_id, moves[batch_id])
        elif to == JobState.QUEUED:
            _reopen(session, batch_id, moves[batch_id])


def sum_up(session: Session, batches: Collection[Batch]) -> dict[uuid.UUID, dict[str, Any]]:
    """The totals of each, as `describe_batch` takes them; those of a finished batch were written down at its end."""
    running = {batch.id: batch for batch in batches if batch.totals is None}
    totals = {batch.id: batch.totals for batch in batches if batch.totals is not None}
    jobs, progress = _count_jobs(session, running), _measure(session, running)
    for each in running:
        totals[each] = {"jobs": jobs[each].model_dump(), "progress": progress[each].model_dump()}
    return totals


def _count_down(session: Session, batch_id: uuid.UUID, ended: int) -> None:
    counted = update(Batch).where(Batch.id == batch_id).values(jobs_left=Batch.jobs_left - ended)
    batch = session.scalars(counted.returning(Batch).execution_options(populate_existing=True)).one()
    if batch.jobs_left > 0:
        return
    batch.finished_at = func.now()
    session.flush()
    session.refresh(batch)
    batch.totals = sum_up(session, [batch])[batch.id]
    session.flush()
    webhooks.enqueue_batch(session, batch, batch.totals)


def _reopen(session: Session, batch_id: uuid.UUID, retried: int) -> None:
    session.execute(
        update(Batch)
        .where(Batch.id == batch_id)
        .values(
            jobs_left=Batch.jobs_left + retried,
            opened_at=case((Batch.finished_at.is_not(None), func.now()), else_=Batch.opened_at),
            finished_at=None,
            totals=None,
        )
        .execution_options(synchronize_session="fetch")
    )


def _count_jobs(session: Session, batches: Collection[uuid.UUID]) -> dict[uuid.UUID, BatchJobs]:
    found = session.execute(
        select(Batch.id, Job.state, func.count())
        .join(Job, Job.batch_id == Batch.id)
        .where(Batch.id.in_(batches), Job.deleted_at.is_(None))
        .group_by(Batch.id, Job.state)
    )
    counted: dict[uuid.UUID, dict[str, int]] = {each: {} for each in batches}
    for batch_id, state, number in found:
        counted[batch_id][state] = number
    return {each: BatchJobs(total=sum(states.values()), **states) for each, states in counted.items()}


def _measure(session: Session, batches: Collection[uuid.UUID]) -> dict[uuid.UUID, BatchProgress]:
    """The formulas are those that `BatchProgress` tells its readers."""
    # An image is one frame, whether or not a worker said so. The length of a recording is known once it was probed;
    # one that ended before has no more frames than it has done.
    length = func.coalesce(Job.frames_total, case((Job.kind == "image", 1), (Job.state.in_(_ENDED), Job.frames_done)))
    left = case((Job.state.in_(_ENDED), 0), else_=func.greatest(length - Job.frames_done, 0))
    recent = Job.started_at >= Batch.opened_at
    until = func.coalesce(Batch.finished_at, func.clock_timestamp())
    found = session.execute(
        select(
            Batch.id,
            func.sum(Job.frames_done).label("done"),
            case((func.bool_or(length.is_(None)), None), else_=func.sum(length)).label("total"),
            func.sum(left).label("left"),
            func.sum(Job.frames_done).filter(recent).label("recent"),
            func.extract("epoch", until - func.min(Job.started_at).filter(recent)).label("seconds"),
        )
        .join(Job, Job.batch_id == Batch.id)
        .where(Batch.id.in_(batches), Job.deleted_at.is_(None))
        .group_by(Batch.id)
    )
    measured = {each: BatchProgress() for each in batches}
    for row in found:
        speed = round(row.recent / float(row.seconds), 6) if row.recent and row.seconds and row.seconds > 0 else None
        goes_on = row.total is not None and speed is not None and row.left > 0
        measured[row.id] = BatchProgress(
            done=row.done,
            total=row.total,
            frames_per_second=speed,
            eta_seconds=round(float(row.left) / speed, 3) if goes_on and speed else None,
        )
    return measured
