"""The order in which queued steps are taken, and which of them workers must be woken for. Changes no state."""

import uuid
from collections.abc import Sequence

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from shared.models import Job, Step, StepState

HINT_SECONDS = 10  # a queued step that nobody claimed is hinted again this often
POSITION_LIMIT = 10_000  # beyond it nobody cares, and counting costs

# The heads of every (tenant, mode) group are found by a loose index scan, so the cost follows the number of groups
# and not the number of queued steps. Several heads per group keep claimers that arrive together from colliding.
_BEST_STEP = text("""
    WITH RECURSIVE groups AS (
        (SELECT tenant_id, mode FROM steps WHERE state = 'queued' AND queue = :queue
         ORDER BY tenant_id, mode LIMIT 1)
        UNION ALL
        SELECT following.tenant_id, following.mode FROM groups CROSS JOIN LATERAL (
            SELECT tenant_id, mode FROM steps WHERE state = 'queued' AND queue = :queue
            AND (tenant_id, mode) > (groups.tenant_id, groups.mode) ORDER BY tenant_id, mode LIMIT 1) following
    ), busy AS (
        SELECT tenant_id, count(*) AS running FROM steps WHERE state = 'running' AND queue = :queue GROUP BY tenant_id
    ), heads AS (
        SELECT head.id, head.priority, coalesce(busy.running, 0) AS running, groups.mode
        FROM groups LEFT JOIN busy USING (tenant_id) CROSS JOIN LATERAL (
            SELECT id, priority FROM steps WHERE state = 'queued' AND queue = :queue
            AND tenant_id = groups.tenant_id AND mode = groups.mode AND run_after <= now()
            ORDER BY priority DESC, id LIMIT 8) head
        WHERE groups.mode = ANY(:modes)
    )
    SELECT steps.id FROM steps JOIN heads USING (id) WHERE steps.state = 'queued'
    ORDER BY heads.priority DESC, heads.running, heads.mode IS DISTINCT FROM :mode_loaded, steps.id
    LIMIT 1 FOR UPDATE OF steps SKIP LOCKED
""")
_OLDEST_STEP = text("""
    SELECT id FROM steps WHERE state = 'queued' AND queue = :queue AND mode = ANY(:modes) AND run_after <= now()
    ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED
""")
_DUE_HINTS = text("""
    WITH idle AS (
        SELECT queue, count(*) AS workers FROM workers
        WHERE step_id IS NULL AND heartbeat_at > now() - make_interval(secs => :gone_seconds) GROUP BY queue
    ), due AS (
        SELECT chosen.id FROM idle CROSS JOIN LATERAL (
            SELECT id FROM steps WHERE state = 'queued' AND steps.queue = idle.queue AND hint_at <= now()
            ORDER BY hint_at LIMIT idle.workers FOR UPDATE SKIP LOCKED) chosen
    )
    UPDATE steps SET hint_at = now() + make_interval(secs => :hint_seconds)
    FROM due WHERE steps.id = due.id RETURNING steps.id, steps.queue
""")


def lock_best_step(session: Session, *, name: str, modes: Sequence[str], mode_loaded: str | None) -> uuid.UUID | None:
    """The step to take next from the queue `name`, locked: priority, tenants with the least running, the mode the
    worker holds, age."""
    step: uuid.UUID | None = session.scalar(
        _BEST_STEP, {"queue": name, "modes": list(modes), "mode_loaded": mode_loaded}
    )
    return step


def lock_oldest_step(session: Session, *, name: str, modes: Sequence[str]) -> uuid.UUID | None:
    """The step that has waited longest, whatever its priority, locked."""
    step: uuid.UUID | None = session.scalar(_OLDEST_STEP, {"queue": name, "modes": list(modes)})
    return step


def find_position(session: Session, job: Job) -> int | None:
    """How many queued steps are taken before this job's first one, at most POSITION_LIMIT; None when it does not wait.

    Fairness between tenants and the mode a worker holds can change the order; this counts by priority and age.
    """
    step = session.scalar(
        select(Step).where(Step.job_id == job.id, Step.state == StepState.QUEUED).order_by(Step.ordinal).limit(1)
    )
    if step is None:
        return None
    ahead = (Step.priority > step.priority) | ((Step.priority == step.priority) & (Step.id < step.id))
    before = (
        select(Step.id).where(Step.state == StepState.QUEUED, Step.queue == step.queue, ahead).limit(POSITION_LIMIT)
    )
    return session.scalar(select(func.count()).select_from(before.subquery()))


def take_due_hints(session: Session, *, gone_seconds: float) -> list[tuple[uuid.UUID, str]]:
    """(step id, queue) of queued steps whose hint is due, no more than there are idle workers to wake.

    A worker that sent no heartbeat for `gone_seconds` does not count.
    """
    rows = session.execute(_DUE_HINTS, {"gone_seconds": gone_seconds, "hint_seconds": HINT_SECONDS})
    return [(row.id, row.queue) for row in rows]
