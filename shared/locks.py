"""Rows locked for a move: always the steps, then their jobs, then a batch, so that no two moves wait for each other.
Uploads, where they matter, come before all of these.

Whoever moves several jobs locks the steps of all, then all the jobs, and only then moves the first of them: the end of
a job writes to its batch.
"""

import uuid
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.errors import LeaseLost, NotFound
from shared.models import Job, Step, StepState, Upload


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A worker's hold on one step. `attempt` is the fencing token: an older one writes nothing."""

    step_id: uuid.UUID
    attempt: int


def lock_lease(session: Session, lease: Lease) -> tuple[list[Step], Step]:
    job_id = session.scalar(select(Step.job_id).where(Step.id == lease.step_id))
    steps = lock_steps(session, job_id) if job_id else []
    for step in steps:
        if step.id == lease.step_id and step.attempt == lease.attempt and step.state == StepState.RUNNING:
            return steps, step
    raise LeaseLost("the step belongs to another attempt")


def lock_running_step(session: Session, lease: Lease) -> Step:
    step = session.scalar(select(Step).where(Step.id == lease.step_id).with_for_update())
    if step is None or step.attempt != lease.attempt or step.state != StepState.RUNNING:
        raise LeaseLost("the step belongs to another attempt")
    return step


def lock_steps(session: Session, *job_ids: uuid.UUID) -> list[Step]:
    locked = select(Step).where(Step.job_id.in_(job_ids)).order_by(Step.job_id, Step.ordinal).with_for_update()
    return list(session.scalars(locked.execution_options(populate_existing=True)))


def lock_uploads(session: Session, job_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
    """The uploads that these jobs read and nobody deleted; none of them goes before the transaction ends."""
    read = select(Job.upload_id).where(Job.id.in_(job_ids), Job.upload_id.is_not(None))
    kept = select(Upload.id).where(Upload.id.in_(read.scalar_subquery()), Upload.deleted_at.is_(None))
    return set(session.scalars(kept.order_by(Upload.id).with_for_update(read=True, key_share=True)))


def lock_jobs(session: Session, job_ids: Collection[uuid.UUID]) -> list[Job]:
    """Those of them that are there."""
    # Not the stronger lock: it would wait for whoever merely refers to the job, and two such could wait for each other.
    locked = select(Job).where(Job.id.in_(job_ids)).order_by(Job.id).with_for_update(key_share=True)
    return list(session.scalars(locked.execution_options(populate_existing=True)))


def lock_job(session: Session, job_id: uuid.UUID) -> Job:
    jobs = lock_jobs(session, [job_id])
    if not jobs:
        raise NotFound("there is no such job")
    return jobs[0]


def lock_shown_job(session: Session, job_id: uuid.UUID) -> Job:
    """For what clients ask; a step that outlived its job's end goes on to its own when the job is deleted meanwhile."""
    job = lock_job(session, job_id)
    if job.deleted_at is not None:
        raise NotFound("there is no such job")
    return job
