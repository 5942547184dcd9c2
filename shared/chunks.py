"""The middle of a recording's life: from its probe to a step for every chunk, and from the last of them to the joining.

The moves themselves are those of `shared/lifecycle.py`.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared import lifecycle
from shared.broker import GPU, IO
from shared.errors import InvalidTransition, ModelChanged
from shared.locks import Lease
from shared.models import Job, Step, StepKind


def plan_chunks(
    session: Session, lease: Lease, *, recording: dict[str, Any], chunks: Sequence[dict[str, Any]], frames: int
) -> list[Step]:
    """End the probe: a step on the gpu queue for every chunk's plan. Raises LeaseLost; InvalidTransition when a cancel
    came first."""
    step, job = lifecycle.finish_step(session, lease, result={"chunks": len(chunks)})
    job.recording, job.chunks_left, job.frames_total = recording, len(chunks), frames
    planned = [
        lifecycle.new_step(job, ordinal, StepKind.INFER, GPU, plan=plan)
        for ordinal, plan in enumerate(chunks, start=step.ordinal + 1)
    ]
    session.add_all(planned)
    lifecycle.add_progress(session, step, job, stage="segmenting", done=0)
    session.flush()
    return planned


def finish_chunk(
    session: Session, lease: Lease, *, result: dict[str, Any], model: dict[str, Any] | None, frames: int
) -> Step | None:
    """End one chunk of a recording; the last of all adds and returns the step that joins them.

    Raises LeaseLost; InvalidTransition when a cancel or another chunk's failure came first; ModelChanged when `model`
    is not the one of the chunks before. A chunk without a sound frame has none.
    """
    step, job = lifecycle.finish_step(session, lease, result=result)
    if job.chunks_left is None:
        raise InvalidTransition("only a planned recording has chunks")
    _check_model(job, model)
    job.chunks_left -= 1
    lifecycle.add_progress(session, step, job, stage="segmenting" if job.chunks_left else "joining", done=frames)
    joining = None
    if job.chunks_left == 0:
        last = session.scalar(select(func.max(Step.ordinal)).where(Step.job_id == job.id))
        joining = lifecycle.new_step(job, (last or 0) + 1, StepKind.FINALIZE, IO)
        session.add(joining)
    session.flush()
    return joining


def _check_model(job: Job, model: dict[str, Any] | None) -> None:
    if job.model is None or model is None:
        job.model = job.model or model
    elif any(job.model[part] != model[part] for part in ("name", "revision", "input_size")):
        raise ModelChanged(f"the model is {model['revision']} by now, and was {job.model['revision']}; submit it anew")
