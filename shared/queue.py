"""The order in which queued steps are taken, and which of them workers must be woken for. Changes no state."""

import math
import uuid
from collections.abc import Sequence

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from shared.models import Job, Step, StepState

HINT_SECONDS = 10  # a queued step that nobody claimed is hinted again this often
POSITION_LIMIT = 10_000  # beyond it nobody cares, and counting costs

# The head of every (tenant, mode) group is found by a loose index scan, so the cost follows the number of groups, and
# not that of queued steps.
_GROUPS = """
    WITH RECURSIVE groups AS (
        (SELECT tenant_id, mode, priority, id, run_after FROM steps WHERE state = 'queued' AND queue = :queue
         ORDER BY tenant_id, mode, priority DESC, id LIMIT 1)
        UNION ALL
        SELECT following.* FROM groups CROSS JOIN LATERAL (
            SELECT tenant_id, mode, priority, id, run_after FROM steps WHERE state = 'queued' AND queue = :queue
            AND (tenant_id, mode) > (groups.tenant_id, groups.mode)
            ORDER BY tenant_id, mode, priority DESC, id LIMIT 1) following
    ), busy AS (
        SELECT tenant_id, count(*) AS running FROM steps WHERE state = 'running' AND queue = :queue GROUP BY tenant_id
    )
"""
# Only of the best groups are more heads looked at: they keep claimers that arrive together from colliding.
_BEST_OF_GROUPS = """
    , best AS (
        SELECT groups.tenant_id, groups.mode, coalesce(busy.running, 0) AS running,
            coalesce(array_position(CAST(:served AS uuid[]), groups.tenant_id), 0) AS turn
        FROM groups LEFT JOIN busy USING (tenant_id) CROSS JOIN LATERAL (
            SELECT groups.id, groups.priority WHERE groups.run_after <= now()
            UNION ALL
            (SELECT id, priority FROM steps WHERE groups.run_after > now() AND state = 'queued' AND queue = :queue
             AND tenant_id = groups.tenant_id AND mode = groups.mode AND run_after <= now()
             ORDER BY priority DESC, id LIMIT 1)) head
        WHERE groups.mode = ANY(:modes)
        ORDER BY head.priority DESC, running, groups.mode IS DISTINCT FROM :mode_loaded, turn, head.id LIMIT 8
    ), heads AS (
        SELECT head.id, head.priority, best.running, best.mode, best.turn FROM best CROSS JOIN LATERAL (
            SELECT id, priority FROM steps WHERE state = 'queued' AND queue = :queue
            AND tenant_id = best.tenant_id AND mode = best.mode AND run_after <= now()
            ORDER BY priority DESC, id LIMIT 8) head
    )
    SELECT steps.id FROM steps JOIN heads USING (id) WHERE steps.state = 'queued'
    ORDER BY heads.priority DESC, heads.running, heads.mode IS DISTINCT FROM :mode_loaded, heads.turn,
        steps.id
    LIMIT 1 FOR UPDATE OF steps SKIP LOCKED
"""
_BEST_STEP = text(_GROUPS + _BEST_OF_GROUPS)
# Of the steps that would be taken next, those that may join the one at hand: what differs in mode or options comes
# first where its priority is higher. A step that was lost with its worker runs alone, lest it takes others along.
_ALIKE_OF_GROUPS = """
    , first AS (
        SELECT steps.mode, jobs.options FROM steps JOIN jobs ON jobs.id = steps.job_id
        WHERE steps.id = :step AND steps.kind = 'infer' AND steps.lost = 0 AND jobs.kind = 'image'
        AND (jobs.source->>'size_bytes')::bigint <= :source_bytes
    ), takers AS (
        SELECT 1 + count(*) AS workers FROM workers CROSS JOIN first WHERE workers.queue = :queue
        AND workers.id <> :worker AND workers.step_id IS NULL
        AND first.mode = ANY(modes) AND heartbeat_at > now() - make_interval(secs => :gone_seconds)
    ), heads AS (
        SELECT head.id, head.priority, groups.tenant_id, coalesce(busy.running, 0) AS running,
            groups.mode = first.mode AND head.kind = 'infer' AND head.lost = 0 AND jobs.kind = 'image'
            AND jobs.options = first.options AND (jobs.source->>'size_bytes')::bigint <= :source_bytes AS alike
        FROM first CROSS JOIN groups LEFT JOIN busy USING (tenant_id) CROSS JOIN LATERAL (
            SELECT id, job_id, kind, lost, priority FROM steps WHERE state = 'queued' AND queue = :queue
            AND tenant_id = groups.tenant_id AND mode = groups.mode AND run_after <= now()
            ORDER BY priority DESC, id LIMIT (SELECT :most * workers FROM takers)) head
        JOIN jobs ON jobs.id = head.job_id
        WHERE groups.mode = ANY(:modes)
    )
    SELECT id, workers FROM heads CROSS JOIN takers
    WHERE alike AND priority >= coalesce((SELECT max(priority) FROM heads WHERE NOT alike), priority)
    ORDER BY priority DESC, running + row_number() OVER (PARTITION BY tenant_id ORDER BY priority DESC, id), id
    LIMIT (SELECT :most * workers FROM takers)
"""
_ALIKE_STEPS = text(_GROUPS + _ALIKE_OF_GROUPS)
_OLDEST_STEP = text("""
    WITH heads AS (
        SELECT head.id FROM unnest(CAST(:modes AS text[])) served CROSS JOIN LATERAL (
            SELECT id FROM steps WHERE state = 'queued' AND queue = :queue AND mode = served AND run_after <= now()
            ORDER BY id LIMIT 8) head
    )
    SELECT steps.id FROM steps JOIN heads USING (id) WHERE steps.state = 'queued'
    ORDER BY steps.id LIMIT 1 FOR UPDATE OF steps SKIP LOCKED
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


def lock_best_step(
    session: Session, *, name: str, modes: Sequence[str], mode_loaded: str | None, served: Sequence[uuid.UUID] = ()
) -> uuid.UUID | None:
    """The step to take next from the queue `name`, locked: priority, tenants with the least running, the mode the
    worker holds, tenants it has not `served`, or longest ago (the last of them comes last), age."""
    step: uuid.UUID | None = session.scalar(
        _BEST_STEP, {"queue": name, "modes": list(modes), "mode_loaded": mode_loaded, "served": list(served)}
    )
    return step


def lock_oldest_step(session: Session, *, name: str, modes: Sequence[str]) -> uuid.UUID | None:
    """The step that has waited longest, whatever its priority, locked."""
    step: uuid.UUID | None = session.scalar(_OLDEST_STEP, {"queue": name, "modes": list(modes)})
    return step


def lock_step(session: Session, step_id: uuid.UUID) -> bool:
    """Whether this step may be taken now and nobody else is taking it; then it is locked."""
    wanted = select(Step.id).where(Step.id == step_id, Step.state == StepState.QUEUED, Step.run_after <= func.now())
    return session.scalar(wanted.with_for_update(skip_locked=True)) is not None


def find_alike(
    session: Session,
    step_id: uuid.UUID,
    *,
    worker_id: uuid.UUID,
    name: str,
    modes: Sequence[str],
    most: int,
    source_bytes: int,
    gone_seconds: float,
) -> list[uuid.UUID]:
    """Steps that the worker which took the image step `step_id` may take along, in the order of taking, at most `most`.

    They have its mode and options, nothing else queued has a higher priority, and as many are left for each idle
    worker. None for images with more than `source_bytes`, nor for a step that was ever lost. A worker that sent no
    heartbeat for `gone_seconds` does not count.
    """
    rows = session.execute(
        _ALIKE_STEPS,
        {
            "queue": name, "modes": list(modes), "worker": worker_id, "step": step_id, "most": most,
            "source_bytes": source_bytes, "gone_seconds": gone_seconds,
        },
    ).all()  # fmt: skip
    if not rows:
        return []
    share = math.ceil((len(rows) + 1) / rows[0].workers) - 1
    return [row.id for row in rows[: min(share, most)]]


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
