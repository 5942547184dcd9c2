"""The end of a batch when many act on it at once: it comes with its last job, once, and nobody waits for ever."""

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from sqlalchemy import func, select, text

from shared import batches, intake, lifecycle, locks
from shared.broker import GPU
from shared.db import SessionFactory
from shared.errors import InvalidTransition
from shared.lifecycle import ClaimedStep
from shared.models import Batch, Job, JobState, StepKind, Tenant, WebhookDelivery, create_id
from tests.integration.conftest import (
    BAD_MEDIA,
    MODEL,
    TIMING,
    Claim,
    count_rows,
    new_job,
    read_only,
    read_steps,
    wait_until,
)

Make = Callable[[int], list[Job]]


@pytest.fixture
def make_batch(sessions: SessionFactory, tenant: Tenant) -> Make:
    """A batch of so many jobs, with a receiver to tell."""

    def make(count: int) -> list[Job]:
        batch = Batch(
            id=create_id(), tenant_id=tenant.id, name="a batch", mode="demo", options={}, details={}, priority=0,
            webhook_url="https://receiver.example", jobs_left=count,
        )  # fmt: skip
        jobs = [new_job(tenant, batch_id=batch.id) for _ in range(count)]
        with sessions.begin() as session:
            session.add(batch)
            session.flush()
            intake.submit_all(session, [(job, [(StepKind.INFER, GPU)]) for job in jobs])
        return jobs

    return make


def at_once(acts: Sequence[Callable[[], object]]) -> None:
    """All of them, each on its own thread, from the same moment on."""
    together = threading.Barrier(len(acts))

    def act(each: Callable[[], object]) -> None:
        together.wait()
        each()

    with ThreadPoolExecutor(len(acts)) as pool:
        for ended in [pool.submit(act, each) for each in acts]:
            ended.result()


def succeed(sessions: SessionFactory, claimed: ClaimedStep) -> None:
    with sessions.begin() as session:
        lifecycle.publish(session, claimed.lease, manifest_key="a key", model=MODEL, timing=TIMING)


def fail(sessions: SessionFactory, claimed: ClaimedStep) -> None:
    with sessions.begin() as session:
        lifecycle.fail_step(session, claimed.lease, BAD_MEDIA, failed_attempts=3)


def cancel_job(sessions: SessionFactory, job: Job) -> None:
    with sessions.begin() as session:
        lifecycle.request_cancel(session, job.id)


@pytest.mark.parametrize("round_", range(5))
def test_jobs_that_end_at_the_same_moment_finish_their_batch_once(
    make_batch: Make, claim: Claim, sessions: SessionFactory, round_: int
) -> None:
    """Two of them succeed, two fail, and two are canceled."""
    jobs = make_batch(6)
    claimed = [each for each in (claim() for _ in range(4)) if each is not None]
    queued = [job for job in jobs if job.id not in {each.job.id for each in claimed}]
    acts = [partial(succeed, sessions, each) for each in claimed[:2]]
    acts += [partial(fail, sessions, each) for each in claimed[2:]]
    acts += [partial(cancel_job, sessions, each) for each in queued]
    random.Random(round_).shuffle(acts)
    at_once(acts)
    batch = read_only(sessions, Batch)
    assert (batch.jobs_left, batch.finished_at is not None) == (0, True)
    assert batch.totals is not None
    assert batch.totals["jobs"] == {
        "total": 6, "succeeded": 2, "failed": 2, "canceled": 2, "queued": 0, "running": 0, "expired": 0
    }  # fmt: skip
    assert count_rows(sessions, WebhookDelivery) == 1


def test_a_batch_is_not_finished_by_a_death_before_the_commit(
    make_batch: Make, claim: Claim, sessions: SessionFactory
) -> None:
    make_batch(1)
    claimed = claim()
    assert claimed is not None
    with sessions() as session:
        lifecycle.publish(session, claimed.lease, manifest_key="a key", model=MODEL, timing=TIMING)
    assert (read_only(sessions, Batch).finished_at, count_rows(sessions, WebhookDelivery)) == (None, 0)
    succeed(sessions, claimed)
    assert count_rows(sessions, WebhookDelivery) == 1


def test_workers_cancels_and_retries_together_neither_block_one_another_nor_miscount(
    make_batch: Make, claim: Claim, sessions: SessionFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadlock would be an OperationalError here; a count that is off leaves the batch open, or closes it early."""
    monkeypatch.setattr("shared.batches.JOBS_AT_ONCE", 7)
    jobs = make_batch(30)
    batch_id = jobs[0].batch_id
    assert batch_id is not None

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(25):
            claimed = claim()
            if claimed is None:
                continue
            try:
                chance.choice((succeed, fail))(sessions, claimed)
            except InvalidTransition:  # a cancel came first
                with sessions.begin() as session:
                    lifecycle.stop_step(session, claimed.lease)

    def cancel() -> None:
        for _ in range(6):
            batches.cancel(sessions, batch_id)

    def retry() -> None:
        for _ in range(6):
            with sessions.begin() as session:
                batches.retry_failed(session, batch_id)

    at_once([*(partial(work, seed) for seed in range(5)), cancel, cancel, retry, retry])
    while (claimed := claim()) is not None:
        succeed(sessions, claimed)
    batches.cancel(sessions, batch_id)
    with sessions() as session:
        ended = session.scalar(select(func.count()).where(Job.state.not_in([JobState.QUEUED, JobState.RUNNING])))
    batch = read_only(sessions, Batch)
    assert (ended, batch.jobs_left, batch.finished_at is not None) == (30, 0, True)
    assert batch.totals is not None
    assert batch.totals["jobs"]["total"] == 30


def test_a_cancel_waits_for_the_jobs_that_are_just_ending_before_it_holds_their_batch(
    make_batch: Make, sessions: SessionFactory
) -> None:
    """Else it would hold the batch that such a job waits for, and wait for that job."""
    _, last = make_batch(2)
    batch_id = last.batch_id
    assert batch_id is not None
    [step] = read_steps(sessions, last)
    with sessions.begin() as session:
        claimed = lifecycle.claim_step(session, step.id, worker_id=create_id(), lease_seconds=30)
    assert claimed is not None
    with ThreadPoolExecutor(1) as pool:
        with sessions.begin() as session:
            locks.lock_lease(session, claimed.lease)
            canceling = pool.submit(batches.cancel, sessions, batch_id)
            wait_until(lambda: somebody_waits(sessions))
            lifecycle.publish(session, claimed.lease, manifest_key="a key", model=MODEL, timing=TIMING)
        canceling.result()
    totals = read_only(sessions, Batch).totals
    assert totals is not None
    assert (totals["jobs"]["succeeded"], totals["jobs"]["canceled"]) == (1, 1)


def somebody_waits(sessions: SessionFactory) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with sessions() as session:
        return bool(session.scalar(text(waiting)))


def test_a_job_of_no_batch_finishes_none(make_batch: Make, claim: Claim, sessions: SessionFactory) -> None:
    [job] = make_batch(1)
    with sessions.begin() as session:
        alone = new_job(session.get_one(Tenant, job.tenant_id), priority=1)
        intake.submit(session, alone, steps=[(StepKind.INFER, GPU)])
    claimed = claim()
    assert claimed is not None
    assert claimed.job.id == alone.id
    succeed(sessions, claimed)
    assert read_only(sessions, Batch).jobs_left == 1
