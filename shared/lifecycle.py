"""The life of a job and its steps: the one door through which either ever changes state.

Every move is a guarded UPDATE from the states the tables below allow, and records an event in the same
transaction; a move to a terminal state also queues the webhook. Writes of a running step are fenced by its attempt.
Rows are locked in one order, steps, job, batch, so that no two moves wait for each other (`shared/locks.py`). A job's
end is also counted for its batch (`shared/tally.py`). How jobs come to be is `shared/intake.py`. What moves the chunks
of a recording is `shared/chunks.py`, and what is too late, `shared/lateness.py`: both by the moves here. Callers
commit.
"""

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared import locks, queue, retention, tally, webhooks
from shared.contract import Failure
from shared.errors import InvalidTransition, JobActive, LeaseLost, SourceRemoved
from shared.locks import Lease
from shared.models import Job, JobEvent, JobState, Step, StepKind, StepState, create_id

JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELED, JobState.EXPIRED}),
    JobState.RUNNING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELED: frozenset({JobState.QUEUED}),
    JobState.EXPIRED: frozenset({JobState.QUEUED}),
}
STEP_MOVES: dict[StepState, frozenset[StepState]] = {
    StepState.QUEUED: frozenset({StepState.RUNNING, StepState.CANCELED}),
    StepState.RUNNING: frozenset({StepState.DONE, StepState.FAILED, StepState.CANCELED, StepState.QUEUED}),
    StepState.DONE: frozenset(),
    StepState.FAILED: frozenset({StepState.QUEUED}),
    StepState.CANCELED: frozenset({StepState.QUEUED}),
}
# Rows come back as the database has them; to find out here as well which of many matched takes time by their square.
_READ_BACK: dict[str, Any] = {"populate_existing": True, "synchronize_session": False}
BACKOFF_SECONDS = (1, 5, 15, 60)  # before the next attempt of a step that met trouble; the last one repeats

_NEXT_HINT = func.now() + timedelta(seconds=queue.HINT_SECONDS)

Orders = Literal["go on", "stop"]


@dataclass(frozen=True, kw_only=True)
class ClaimedStep:
    lease: Lease
    job: Job
    kind: StepKind
    ordinal: int
    plan: dict[str, Any] | None


# --- the guarded moves that everything below is made of ----------------------------------------------------------


def move_job(session: Session, job_id: uuid.UUID, to: JobState, **values: Any) -> Job:
    """Raises InvalidTransition, with nothing written, when the job is not in a state that may become `to`."""
    moved = move_jobs(session, [job_id], to, **values)
    if not moved:
        raise InvalidTransition(f"the job is not in a state that can become {to}")
    return moved[0]


def move_jobs(session: Session, job_ids: Collection[uuid.UUID], to: JobState, **values: Any) -> list[Job]:
    """Those of the jobs that were in a state that may become `to`, moved. Of several, all are locked before."""
    if not job_ids:
        return []
    sources = [state for state, targets in JOB_MOVES.items() if to in targets]
    if to.is_terminal:
        values |= {"finished_at": func.now(), "expires_at": func.now() + _interval(Job.keep_seconds)}
        values |= {"source_expires_at": func.now() + retention.keep_source()}
        values |= {"ends": Job.ends + 1}
    moved = list(
        session.scalars(
            update(Job)
            .where(Job.id.in_(job_ids), Job.state.in_(sources), Job.deleted_at.is_(None))
            .values(state=to, **values)
            .returning(Job)
            .execution_options(**_READ_BACK)
        )
    )
    for job in moved:
        _record(session, job.id, "state", {"state": to, **({"error": job.error} if job.error else {})})
    if to.is_terminal:
        webhooks.enqueue(session, moved)
    tally.count(session, moved, to)
    return moved


def move_step(session: Session, step_id: uuid.UUID, to: StepState, *, fence: int | None = None, **values: Any) -> Step:
    """Raises LeaseLost when the attempt `fence` no longer runs, without one InvalidTransition; then writes nothing."""
    moved = _move_steps(session, [step_id], to, fence=fence, **values)
    if not moved and fence is not None:
        raise LeaseLost("the step belongs to another attempt")
    if not moved:
        raise InvalidTransition(f"the step is not in a state that can become {to}")
    return moved[0]


def _move_steps(
    session: Session, step_ids: Collection[uuid.UUID], to: StepState, *, fence: int | None = None, **values: Any
) -> list[Step]:
    if not step_ids:
        return []
    sources = [state for state, targets in STEP_MOVES.items() if to in targets]
    statement = update(Step).where(Step.id.in_(step_ids), Step.state.in_(sources))
    if fence is not None:
        statement = statement.where(Step.state == StepState.RUNNING, Step.attempt == fence)
    if to != StepState.RUNNING:
        values["lease_expires_at"] = None
    return list(
        session.scalars(statement.values(state=to, **values).returning(Step).execution_options(populate_existing=True))
    )


# --- what a client may ask for -----------------------------------------------------------------------------------


def request_cancel(session: Session, job_id: uuid.UUID) -> Job:
    """Cancel at once what no worker holds; a running step is told at its next heartbeat and ends the job then."""
    steps = locks.lock_steps(session, job_id)
    job = locks.lock_shown_job(session, job_id)
    if job.state.is_terminal:
        raise InvalidTransition(f"the job is already {job.state}")
    _cancel(session, [job], steps)
    return job


def request_cancels(session: Session, job_ids: Collection[uuid.UUID]) -> None:
    """As `request_cancel`, of many; those that have ended stay as they are."""
    steps = locks.lock_steps(session, *job_ids)
    jobs = locks.lock_jobs(session, job_ids)
    _cancel(session, [job for job in jobs if not job.state.is_terminal], steps)


def retry(session: Session, job_id: uuid.UUID) -> tuple[Job, list[Step]]:
    """The same job again with its finished steps kept, and the steps that are queued once more.

    Raises InvalidTransition unless the job ended without a result; SourceRemoved.
    """
    jobs, woken = retry_all(session, [job_id])
    if jobs:
        return jobs[0], woken
    if JobState.QUEUED in JOB_MOVES[locks.lock_shown_job(session, job_id).state]:
        raise SourceRemoved("the source of this job was kept for as long as the job says; submit it anew")
    raise InvalidTransition("the job has not ended, or has a result")


def retry_all(session: Session, job_ids: Collection[uuid.UUID]) -> tuple[list[Job], list[Step]]:
    """As `retry`, of many; those that have not ended, have a result or no source any more, stay as they are."""
    uploads = locks.lock_uploads(session, job_ids)
    steps = locks.lock_steps(session, *job_ids)
    readable = retention.find_readable(session, locks.lock_jobs(session, job_ids), uploads)
    jobs = move_jobs(
        session, readable, JobState.QUEUED,
        queued_at=func.now(), start_by=func.now() + _interval(Job.start_deadline_seconds), started_at=None,
        stop_by=None, finished_at=None, expires_at=None, source_expires_at=None, cancel_requested_at=None, error=None,
        stage=None,
    )  # fmt: skip
    moved = {job.id for job in jobs}
    stopped = [
        step.id for step in steps if step.job_id in moved and step.state in (StepState.FAILED, StepState.CANCELED)
    ]
    again: dict[str, Any] = {"lost": 0, "failures": 0, "error": None, "finished_at": None, "run_after": func.now()}
    woken = _move_steps(session, stopped, StepState.QUEUED, hint_at=_NEXT_HINT, **again)
    for job_id in {step.job_id for step in steps if step.job_id in moved and step.state == StepState.RUNNING}:
        _start_job(session, job_id)  # one that had not yet heard of the job's end goes on
    return jobs, woken


def delete_job(session: Session, job_id: uuid.UUID) -> None:
    """Hide the job at once; upkeep removes its files and then its row. Raises JobActive before it has ended."""
    job = locks.lock_shown_job(session, job_id)
    if not job.state.is_terminal:
        raise JobActive(f"the job is {job.state}; cancel it first")
    job.deleted_at = func.now()
    session.flush()


def delete_jobs(session: Session, job_ids: Collection[uuid.UUID]) -> None:
    """As `delete_job`, of many; those that have not ended stay."""
    for job in locks.lock_jobs(session, job_ids):
        if job.state.is_terminal and job.deleted_at is None:
            job.deleted_at = func.now()
    session.flush()


# --- what a worker does ------------------------------------------------------------------------------------------


def claim(
    session: Session,
    *,
    worker_id: uuid.UUID,
    queue_name: str,
    modes: Sequence[str],
    mode_loaded: str | None,
    lease_seconds: float,
    served: Sequence[uuid.UUID] = (),
    oldest_first: bool = False,
) -> ClaimedStep | None:
    """Take the best queued step, or None. Best: priority, tenants with the least running, the mode held, age.

    Tenants that are alike up to the mode take turns: `served` are those that this worker had, the last one at the end.
    A worker passes `oldest_first` now and then, so that nothing of low priority starves.
    """
    step_id = (
        queue.lock_oldest_step(session, name=queue_name, modes=modes)
        if oldest_first
        else queue.lock_best_step(session, name=queue_name, modes=modes, mode_loaded=mode_loaded, served=served)
    )
    return None if step_id is None else _take(session, step_id, worker_id=worker_id, lease_seconds=lease_seconds)


def claim_step(
    session: Session, step_id: uuid.UUID, *, worker_id: uuid.UUID, lease_seconds: float
) -> ClaimedStep | None:
    """Take this one step; None when it is no longer queued or is just being taken."""
    if not queue.lock_step(session, step_id):
        return None
    return _take(session, step_id, worker_id=worker_id, lease_seconds=lease_seconds)


def heartbeat(session: Session, lease: Lease, *, lease_seconds: float) -> Orders:
    """Hold the step for another `lease_seconds`; "stop" when its job was canceled or has ended. Raises LeaseLost."""
    job_id = session.scalar(
        update(Step)
        .where(Step.id == lease.step_id, Step.attempt == lease.attempt, Step.state == StepState.RUNNING)
        .values(lease_expires_at=_in(lease_seconds))
        .returning(Step.job_id)
    )
    if job_id is None:
        raise LeaseLost("the step belongs to another attempt")
    canceled, state = session.execute(select(Job.cancel_requested_at, Job.state).where(Job.id == job_id)).one()
    return _give_orders(canceled, state)


def report_progress(session: Session, lease: Lease, *, stage: str, done: int, total: int | None = None) -> Orders:
    """Tell how many frames this step has done, and hear as `heartbeat` does; the job's are those of all its steps.

    `total` is the job's, for a step that knows it and comes first. Raises LeaseLost.
    """
    step = locks.lock_running_step(session, lease)
    job = locks.lock_job(session, step.job_id)
    add_progress(session, step, job, stage=stage, done=done, total=total)
    session.flush()
    return _give_orders(job.cancel_requested_at, job.state)


def publish(
    session: Session, lease: Lease, *, manifest_key: str, model: dict[str, Any] | None, timing: dict[str, Any]
) -> Job:
    """End the step and with it its job: from this commit on the result exists. Raises LeaseLost; InvalidTransition
    when a cancel came first."""
    _, job = finish_step(session, lease)
    return move_job(
        session, job.id, JobState.SUCCEEDED,
        manifest_key=manifest_key, model=model, timing=timing, stage="done", progress_at=func.now(),
        frames_done=timing["frames"], frames_total=timing["frames"],
    )  # fmt: skip


def fail_step(session: Session, lease: Lease, failure: Failure, *, failed_attempts: int) -> Step:
    """The attempt met trouble: try again after a pause if that can help, else fail the job. Raises LeaseLost."""
    steps, step = locks.lock_lease(session, lease)
    failures = step.failures + 1
    error = failure.model_dump()
    if failure.retryable and failures < failed_attempts and not must_stop(session, step):
        pause = _in(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1])
        step = move_step(
            session, step.id, StepState.QUEUED,
            fence=lease.attempt, failures=failures, error=error, run_after=pause, hint_at=pause,
        )  # fmt: skip
        _record_attempt(session, step, "put off", error=error)
        return step
    return fail_job(session, step, steps, error, failures=failures)


def release_step(session: Session, lease: Lease) -> Step:
    """A draining worker gives the step back; the attempt is not held against it. Raises LeaseLost."""
    steps, step = locks.lock_lease(session, lease)
    return requeue_step(session, step, steps, "released")


def stop_step(session: Session, lease: Lease) -> Step:
    """The worker obeyed "stop": the step ends canceled, and so does its job if no other step runs. Raises LeaseLost."""
    steps, step = locks.lock_lease(session, lease)
    return _cancel_running(session, step, steps)


# --- shared by the above -----------------------------------------------------------------------------------------


def _take(session: Session, step_id: uuid.UUID, *, worker_id: uuid.UUID, lease_seconds: float) -> ClaimedStep:
    step = move_step(
        session, step_id, StepState.RUNNING,
        attempt=Step.attempt + 1, worker_id=worker_id, lease_expires_at=_in(lease_seconds), started_at=func.now(),
    )  # fmt: skip
    # One statement for the first step of a job, which is all that an image has.
    job = _start_job(session, step.job_id, attempts=func.greatest(Job.attempts, step.attempt))
    if job is None:
        job = locks.lock_job(session, step.job_id)
        job.attempts = max(job.attempts, step.attempt)
    job.frames_done -= step.frames_done  # what the attempt before had done is done again
    step.frames_done = 0
    _record_attempt(session, step, "started")
    session.flush()
    lease = Lease(step_id=step.id, attempt=step.attempt)
    return ClaimedStep(lease=lease, job=job, kind=step.kind, ordinal=step.ordinal, plan=step.plan)


def requeue_step(session: Session, step: Step, steps: Sequence[Step], outcome: str) -> Step:
    """Queue a running step again, unless its job must stop."""
    if must_stop(session, step):
        return _cancel_running(session, step, steps)
    step = move_step(session, step.id, StepState.QUEUED, run_after=func.now(), hint_at=func.now())
    _record_attempt(session, step, outcome)
    return step


def _give_orders(cancel_requested_at: datetime | None, state: JobState) -> Orders:
    return "stop" if cancel_requested_at is not None or state.is_terminal else "go on"


def enter(job: Job) -> None:
    """Where the life of every job begins; the row is not written yet."""
    job.state = JobState.QUEUED


def new_step(
    job: Job, ordinal: int, kind: StepKind, queue_name: str, *,
    plan: dict[str, Any] | None = None, hint_at: datetime | None = None,
) -> Step:  # fmt: skip
    """A queued step of a job, to be added to the session."""
    return Step(
        id=create_id(), job_id=job.id, tenant_id=job.tenant_id, ordinal=ordinal, kind=kind, queue=queue_name,
        mode=job.mode, priority=job.priority, state=StepState.QUEUED, plan=plan,
        hint_at=hint_at or _NEXT_HINT,
    )  # fmt: skip


def finish_step(session: Session, lease: Lease, **values: Any) -> tuple[Step, Job]:
    """The step done, and its job locked. Raises InvalidTransition when the job has no more use for it."""
    step = move_step(session, lease.step_id, StepState.DONE, fence=lease.attempt, finished_at=func.now(), **values)
    job = locks.lock_job(session, step.job_id)
    if job.cancel_requested_at is not None or job.state.is_terminal:
        raise InvalidTransition("the job was canceled or has ended before this was done")
    _record_attempt(session, step, "done")
    return step, job


def add_progress(session: Session, step: Step, job: Job, *, stage: str, done: int, total: int | None = None) -> None:
    """What a step has done adds up to what its job has; both rows are locked."""
    job.frames_done += done - step.frames_done
    step.frames_done = done
    job.stage, job.progress_at = stage, func.now()
    if total is not None:
        job.frames_total = total
    told = {"stage": stage, "done": job.frames_done, "total": job.frames_total, "unit": "frames"}
    _record(session, job.id, "progress", told)


def _start_job(session: Session, job_id: uuid.UUID, **values: Any) -> Job | None:
    """None when it has begun, or ended, before."""
    stop_by = func.now() + _interval(Job.run_timeout_seconds)
    started = move_jobs(session, [job_id], JobState.RUNNING, started_at=func.now(), stop_by=stop_by, **values)
    return started[0] if started else None


def _cancel_running(session: Session, step: Step, steps: Sequence[Step]) -> Step:
    step = move_step(session, step.id, StepState.CANCELED, fence=step.attempt, finished_at=func.now())
    job = locks.lock_job(session, step.job_id)
    _record_attempt(session, step, "canceled")
    cancel_queued(session, steps)
    if not job.state.is_terminal and not any(other.state == StepState.RUNNING for other in steps):
        move_job(session, job.id, JobState.CANCELED)
    return step


def fail_job(session: Session, step: Step, steps: Sequence[Step], error: dict[str, Any], **values: Any) -> Step:
    """Fail the step, and with it the job: what is queued of it is canceled, what runs is told at its heartbeat."""
    step = move_step(
        session, step.id, StepState.FAILED, fence=step.attempt, error=error, finished_at=func.now(), **values
    )
    job = locks.lock_job(session, step.job_id)
    _record_attempt(session, step, "failed", error=error)
    cancel_queued(session, steps)
    if not job.state.is_terminal:
        move_job(session, job.id, JobState.FAILED, error=error)
    return step


def _cancel(session: Session, jobs: Sequence[Job], steps: Sequence[Step]) -> None:
    wanted = update(Job).where(Job.id.in_([job.id for job in jobs]), Job.cancel_requested_at.is_(None))
    session.scalars(wanted.values(cancel_requested_at=func.now()).returning(Job).execution_options(**_READ_BACK)).all()
    going_on = {job.id for job in jobs}
    cancel_queued(session, [step for step in steps if step.job_id in going_on])
    going_on -= {step.job_id for step in steps if step.state == StepState.RUNNING}
    move_jobs(session, going_on, JobState.CANCELED)


def cancel_queued(session: Session, steps: Sequence[Step]) -> None:
    """Those of `steps`, which are locked, that no worker holds."""
    queued = [step.id for step in steps if step.state == StepState.QUEUED]
    _move_steps(session, queued, StepState.CANCELED, finished_at=func.now())


def must_stop(session: Session, step: Step) -> bool:
    """Whether the step's job was canceled or has ended."""
    job = locks.lock_job(session, step.job_id)
    return job.cancel_requested_at is not None or job.state.is_terminal


def _record(session: Session, job_id: uuid.UUID, kind: str, data: dict[str, Any]) -> None:
    session.add(JobEvent(job_id=job_id, type=kind, data=data))


def _record_attempt(session: Session, step: Step, outcome: str, *, error: dict[str, Any] | None = None) -> None:
    data = {"step": step.ordinal, "attempt": step.attempt, "outcome": outcome, **({"error": error} if error else {})}
    _record(session, step.job_id, "attempt", data)


def _in(seconds: float) -> ColumnElement[datetime]:
    return func.now() + timedelta(seconds=seconds)


def _interval(seconds: InstrumentedAttribute[float]) -> ColumnElement[timedelta]:
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds)
