"""What is done about steps and jobs that are late: their workers vanished, nobody began, or it took too long.

The moves themselves are those of `shared/lifecycle.py`.
"""

import uuid

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from shared import lifecycle, locks
from shared.contract import Failure
from shared.models import Job, JobState, Step, StepState


def reap(session: Session, *, lost_attempts: int) -> Step | None:
    """Take one step back from a worker whose lease ran out; None when there is none.

    `lost_attempts` of these, and the step fails with `worker_lost`.
    """
    late = (Step.state == StepState.RUNNING) & (Step.lease_expires_at < func.now())
    found = session.execute(select(Step.id, Step.job_id).where(late).order_by(Step.lease_expires_at).limit(1)).first()
    return None if found is None else _take_back(session, found.id, found.job_id, late, lost_attempts=lost_attempts)


def find_lease_end(session: Session) -> float | None:
    """In how many seconds the next lease runs out unless it is renewed; None when nobody holds one."""
    left = func.extract("epoch", func.min(Step.lease_expires_at) - func.clock_timestamp())
    seconds = session.scalar(select(left).where(Step.state == StepState.RUNNING))
    return None if seconds is None else float(seconds)


def take_from(session: Session, worker_id: uuid.UUID, *, lost_attempts: int) -> Step | None:
    """As `reap`, from a worker that is known to be dead, whose lease need not run out; None when it holds no step."""
    held = (Step.state == StepState.RUNNING) & (Step.worker_id == worker_id)
    for found in session.execute(select(Step.id, Step.job_id).where(held).order_by(Step.id)).all():
        if step := _take_back(session, found.id, found.job_id, held, lost_attempts=lost_attempts):
            return step
    return None


def expire(session: Session) -> Job | None:
    """Expire one job that nobody started by its deadline; None when there is none."""
    late = (Job.state == JobState.QUEUED) & (Job.start_by < func.now())
    return _end_late(session, late, JobState.EXPIRED, "start_deadline", "no worker started the job by its deadline")


def time_out(session: Session) -> Job | None:
    """Fail one job that ran longer than it may; its running steps are told to stop. None when there is none."""
    late = (Job.state == JobState.RUNNING) & (Job.stop_by < func.now())
    return _end_late(session, late, JobState.FAILED, "timeout", "the job ran longer than run_timeout_seconds allows")


def _end_late(session: Session, late: ColumnElement[bool], to: JobState, code: str, detail: str) -> Job | None:
    job_id = session.scalar(select(Job.id).where(late).limit(1))
    if job_id is None:
        return None
    steps = locks.lock_steps(session, job_id)
    if session.scalar(select(Job.id).where(Job.id == job_id, late).with_for_update()) is None:
        return None
    lifecycle.cancel_queued(session, steps)
    return lifecycle.move_job(
        session, job_id, to, error=Failure(code=code, detail=detail, retryable=False).model_dump()
    )


def _take_back(
    session: Session, step_id: uuid.UUID, job_id: uuid.UUID, lost: ColumnElement[bool], *, lost_attempts: int
) -> Step | None:
    steps = locks.lock_steps(session, job_id)
    step = session.scalar(select(Step).where(Step.id == step_id, lost))
    if step is None:  # it was renewed, ended or taken back meanwhile
        return None
    step.lost += 1
    session.flush()
    if step.lost >= lost_attempts and not lifecycle.must_stop(session, step):
        detail = f"the worker vanished {step.lost} times while it ran this step"
        failure = Failure(code="worker_lost", detail=detail, retryable=True)
        return lifecycle.fail_job(session, step, steps, failure.model_dump())
    return lifecycle.requeue_step(session, step, steps, "lost")
