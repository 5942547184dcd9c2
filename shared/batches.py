"""What a client may ask of a whole batch. Its jobs move through `shared/lifecycle.py`, as everywhere."""

import uuid

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared import lifecycle
from shared.db import SessionFactory
from shared.models import Job, JobState, Step

_ENDED = [state for state in JobState if state.is_terminal]
JOBS_AT_ONCE = 500
"""Few enough that a running job's heartbeat waits for none of it."""


def cancel(sessions: SessionFactory, batch_id: uuid.UUID) -> None:
    """Ask for the end of every job that has not ended, in slices of one transaction each.

    After a death in the middle, asking again cancels the rest.
    """
    last = uuid.UUID(int=0)
    while True:
        with sessions.begin() as session:
            ids = list(
                session.scalars(
                    select(Job.id)
                    .where(
                        Job.batch_id == batch_id,
                        Job.state.in_([JobState.QUEUED, JobState.RUNNING]),
                        Job.cancel_requested_at.is_(None),
                        Job.id > last,
                    )
                    .order_by(Job.id)
                    .limit(JOBS_AT_ONCE)
                )
            )
            lifecycle.request_cancels(session, ids)
        if len(ids) < JOBS_AT_ONCE:
            return
        last = ids[-1]


def delete_jobs(sessions: SessionFactory, batch_id: uuid.UUID) -> None:
    """Cancel every job that has not ended, and delete every one that has; those that run end when their workers hear
    of it, and asking again deletes them then."""
    cancel(sessions, batch_id)
    while True:
        with sessions.begin() as session:
            ended = Job.batch_id == batch_id, Job.deleted_at.is_(None), Job.state.in_(_ENDED)
            ids = list(session.scalars(select(Job.id).where(*ended).limit(JOBS_AT_ONCE)))
            lifecycle.delete_jobs(session, ids)
        if len(ids) < JOBS_AT_ONCE:
            return


def retry_failed(session: Session, batch_id: uuid.UUID) -> list[Step]:
    """Queue every job again that ended without a result, which reopens the batch; returns the steps to wake for.

    All in one transaction: between slices, the jobs of the first could end and finish a batch that is not complete.
    """
    ended = [JobState.FAILED, JobState.CANCELED, JobState.EXPIRED]
    wanted = select(Job.id).where(Job.batch_id == batch_id, Job.state.in_(ended), Job.deleted_at.is_(None))
    _, woken = lifecycle.retry_all(session, list(session.scalars(wanted)))
    return woken
