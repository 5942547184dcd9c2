"""A recording's life in the database: one probe, a step for every chunk, and one that joins them, exactly once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shared import chunks, intake, lifecycle
from shared.broker import GPU, IO
from shared.db import SessionFactory
from shared.errors import InvalidTransition, LeaseLost, ModelChanged
from shared.lifecycle import ClaimedStep
from shared.models import Job, JobState, Step, StepKind, StepState, Tenant
from tests.integration.conftest import BAD_MEDIA, MODEL, Take, new_job, older, read_job, read_steps

FOUND = {"time_base": "1/25"}


@pytest.fixture
def recording(sessions: SessionFactory, tenant: Tenant) -> Job:
    with sessions.begin() as session:
        job = new_job(tenant, kind="recording")
        intake.submit(session, job, steps=[(StepKind.PROBE, IO)])
        return job


@pytest.fixture
def planned(recording: Job, take: Take, sessions: SessionFactory) -> Job:
    """A recording of three chunks of ten frames."""
    with sessions.begin() as session:
        plans = [{"ordinal": number} for number in range(3)]
        chunks.plan_chunks(session, take(queue_name=IO).lease, recording=FOUND, chunks=plans, frames=30)
    return recording


def finish(sessions: SessionFactory, claimed: ClaimedStep, **result: Any) -> Step | None:
    with sessions.begin() as session:
        return chunks.finish_chunk(session, claimed.lease, result=result, model=MODEL, frames=10)


def test_a_plan_ends_the_probe_and_queues_every_chunk(planned: Job, sessions: SessionFactory, take: Take) -> None:
    probe, *chunks = read_steps(sessions, planned)
    assert (probe.state, probe.kind) == (StepState.DONE, StepKind.PROBE)
    assert [(step.kind, step.queue, step.state) for step in chunks] == [(StepKind.INFER, GPU, StepState.QUEUED)] * 3
    claimed = take()
    assert (claimed.plan, claimed.job.recording) == ({"ordinal": 0}, FOUND)
    assert (claimed.job.frames_done, claimed.job.frames_total) == (0, 30)


def test_the_last_chunk_to_end_and_no_other_adds_the_step_that_joins_them(
    planned: Job, sessions: SessionFactory, take: Take
) -> None:
    claimed = [take() for _ in range(3)]
    assert finish(sessions, claimed[2]) is None
    assert finish(sessions, claimed[0]) is None
    joining = finish(sessions, claimed[1])
    assert joining is not None
    assert (joining.kind, joining.queue, joining.ordinal) == (StepKind.FINALIZE, IO, 4)
    assert len(read_steps(sessions, planned)) == 5
    job = read_job(sessions, planned)
    assert (job.state, job.stage, job.frames_done, job.chunks_left) == (JobState.RUNNING, "joining", 30, 0)


def test_chunks_that_end_at_the_same_moment_add_it_once(planned: Job, sessions: SessionFactory, take: Take) -> None:
    claimed, together = [take() for _ in range(3)], threading.Barrier(3)

    def end(each: ClaimedStep) -> Step | None:
        together.wait()
        return finish(sessions, each)

    with ThreadPoolExecutor(3) as pool:
        added = [step for step in pool.map(end, claimed) if step is not None]
    assert len(added) == 1
    assert [step.kind for step in read_steps(sessions, planned)].count(StepKind.FINALIZE) == 1


def test_joining_them_publishes_the_job(planned: Job, sessions: SessionFactory, take: Take) -> None:
    for _ in range(3):
        finish(sessions, take())
    with sessions.begin() as session:
        lifecycle.publish(session, take(queue_name=IO).lease, manifest_key="a key", model=MODEL, timing={"frames": 30})
    job = read_job(sessions, planned)
    assert (job.state, job.manifest_key, job.frames_done) == (JobState.SUCCEEDED, "a key", 30)


def test_progress_is_the_sum_over_the_chunks_and_takes_back_what_a_lost_attempt_told(
    planned: Job, sessions: SessionFactory, take: Take
) -> None:
    first, second = take(), take()
    with sessions.begin() as session:
        lifecycle.report_progress(session, first.lease, stage="segmenting", done=4)
        lifecycle.report_progress(session, second.lease, stage="segmenting", done=7)
        lifecycle.report_progress(session, second.lease, stage="segmenting", done=9)
    assert read_job(sessions, planned).frames_done == 13
    with sessions.begin() as session:
        lifecycle.release_step(session, second.lease)
    take()
    assert read_job(sessions, planned).frames_done == 4
    finish(sessions, first)
    assert read_job(sessions, planned).frames_done == 10


def test_a_retry_keeps_the_chunks_that_are_done(planned: Job, sessions: SessionFactory, take: Take) -> None:
    finish(sessions, take(), made="once")
    with sessions.begin() as session:
        lifecycle.fail_step(session, take().lease, BAD_MEDIA, failed_attempts=3)
    assert read_job(sessions, planned).state == JobState.FAILED
    with sessions.begin() as session:
        _, woken = lifecycle.retry(session, planned.id)
    assert sorted(step.ordinal for step in woken) == [2, 3]
    finish(sessions, take())
    assert finish(sessions, take()) is not None
    assert read_steps(sessions, planned)[1].result == {"made": "once"}


def test_a_zombies_chunk_is_not_counted(planned: Job, sessions: SessionFactory, take: Take) -> None:
    claimed = take()
    with sessions.begin() as session, pytest.raises(LeaseLost):
        chunks.finish_chunk(session, older(claimed.lease), result={}, model=MODEL, frames=10)
    finish(sessions, claimed)
    with sessions.begin() as session, pytest.raises(LeaseLost):
        chunks.finish_chunk(session, claimed.lease, result={}, model=MODEL, frames=10)
    assert read_job(sessions, planned).chunks_left == 2


def test_after_a_cancel_no_chunk_is_done_and_no_plan_is_made(
    planned: Job, sessions: SessionFactory, take: Take
) -> None:
    claimed = take()
    with sessions.begin() as session:
        lifecycle.request_cancel(session, planned.id)
    with sessions() as session, pytest.raises(InvalidTransition):
        chunks.finish_chunk(session, claimed.lease, result={}, model=MODEL, frames=10)
    with sessions.begin() as session:
        lifecycle.stop_step(session, claimed.lease)
    assert read_job(sessions, planned).state == JobState.CANCELED
    assert {step.state for step in read_steps(sessions, planned)} == {StepState.DONE, StepState.CANCELED}


def test_chunks_of_unlike_models_do_not_go_together(planned: Job, sessions: SessionFactory, take: Take) -> None:
    finish(sessions, take())
    claimed = take()
    with sessions() as session, pytest.raises(ModelChanged):
        chunks.finish_chunk(session, claimed.lease, result={}, model={**MODEL, "revision": "2"}, frames=10)
    assert read_job(sessions, planned).chunks_left == 2
