"""One step, start to end: claim it, run it, and write down how it ended.

Every step ends in exactly one fenced write: done, failed, given back or stopped. A worker that lost its lease writes
nothing at all. What happens in between is the business of `worker/fetch.py` for a source that lies elsewhere, of
`worker/images.py` for an image, and for a recording of `worker/probe.py`, `worker/chunks.py` and `worker/bundle.py`;
how several images share the model, each of them living the same life as one alone, is `worker/rounds.py`.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import structlog
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from shared import chunks, faults, lifecycle, queue, sources
from shared.broker import Hints
from shared.config import Settings
from shared.contract import Failure
from shared.db import SessionFactory
from shared.errors import NO_ROOM, InvalidTransition, LeaseLost, MasklineError, ModelChanged
from shared.inference.errors import InferenceError
from shared.lifecycle import ClaimedStep
from shared.locks import Lease
from shared.models import Step, StepKind, Worker
from shared.storage import Storage
from worker.desk import Desk
from worker.fetch import Fetched, fetch
from worker.heart import Draining, Flag, Heart, Hold, Stopped
from worker.images import Segmenter, make_result
from worker.manifest import Result
from worker.rounds import Round, count_places
from worker.teller import Report, Teller

if TYPE_CHECKING:
    from shared.inference.engine import Engine
    from worker.chunks import ChunkResult
    from worker.probe import Plan

log = structlog.get_logger(__name__)

OLDEST_FIRST_EVERY = 16  # one step in so many is the oldest whatever its priority, so that none starves
TURNS_KEPT = 1000  # tenants; one that comes back after so many others is a new one
ROUND_SOURCE_BYTES = 32 * 2**20  # larger images run alone
DATABASE_PAUSE_SECONDS = 0.5
DATABASE_AWAY = (OperationalError, PoolTimeoutError)
MOST_HINTS = 16  # of the steps that one step adds; upkeep wakes whoever is idle for the others


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a step ended, for the log, and the steps that it queued."""

    outcome: str
    queued: Sequence[Step] = ()


Write: TypeAlias = Callable[[Session], Ending]
"""Writes down how a step ended. Raises LeaseLost."""


class Runner:
    """Runs the steps of one queue in one process: alone, or in rounds of images that the model takes together.

    `engine` is None on the io queue.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        sessions: SessionFactory,
        storage: Storage,
        hints: Hints,
        heart: Heart,
        draining: Flag,
        queue_name: str,
        engine: "Engine | None",
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._storage = storage
        self._hints = hints
        self._heart = heart
        self._draining = draining
        self._queue_name = queue_name
        self._engine = engine
        self._teller = Teller(sessions)
        self._mode_loaded: str | None = None
        self._places = count_places(engine) if engine else 1
        self._oldest_first_every = max(OLDEST_FIRST_EVERY, 2 * self._places)  # room for a round that fills the device
        self._since_oldest = 0
        self._served: dict[uuid.UUID, None] = {}
        """Tenants, the one served last at the end."""

    def run_until_idle(self) -> None:
        """Claim and run steps for as long as there are any."""
        while not self._draining.is_set():
            claimed, alike = self._claim()
            if claimed is None:
                return
            if self._engine is not None and alike:
                self._run_round(self._engine, claimed, alike)
            else:
                self._run(claimed, self._engine)

    def _claim(self) -> tuple[ClaimedStep | None, list[uuid.UUID]]:
        """The next step, entered in the worker's row in the same transaction, and which may be claimed along with it.

        No step clears that row.
        """
        oldest_first = self._since_oldest + 1 >= self._oldest_first_every
        alike: list[uuid.UUID] = []
        with self._sessions.begin() as session:
            claimed = lifecycle.claim(
                session, worker_id=self._heart.worker_id, queue_name=self._queue_name,
                modes=self._settings.worker.modes, mode_loaded=self._mode_loaded,
                lease_seconds=self._settings.worker.lease_seconds, served=tuple(self._served),
                oldest_first=oldest_first,
            )  # fmt: skip
            if claimed is not None:
                self._note_served(claimed.job.tenant_id)
                self._since_oldest = 0 if oldest_first else self._since_oldest + 1
                alike = self._find_alike(session, claimed)
            session.execute(
                update(Worker)
                .where(Worker.id == self._heart.worker_id)
                .values(step_id=claimed.lease.step_id if claimed else None, mode_loaded=self._mode_loaded)
            )
        return claimed, alike

    def _note_served(self, tenant_id: uuid.UUID) -> None:
        self._served.pop(tenant_id, None)
        self._served[tenant_id] = None
        if len(self._served) > TURNS_KEPT:
            del self._served[next(iter(self._served))]

    def _find_alike(self, session: Session, claimed: ClaimedStep) -> list[uuid.UUID]:
        most = self._oldest_first_every - 1 - self._since_oldest
        if self._places == 1 or most == 0:
            return []
        alike = queue.find_alike(
            session, claimed.lease.step_id, worker_id=self._heart.worker_id, name=self._queue_name,
            modes=self._settings.worker.modes, most=most, source_bytes=ROUND_SOURCE_BYTES,
            gone_seconds=self._settings.upkeep.worker_gone_seconds,
        )  # fmt: skip
        self._since_oldest += len(alike)
        return alike

    def _run_round(self, engine: "Engine", claimed: ClaimedStep, alike: Sequence[uuid.UUID]) -> None:
        """Run the step and, each claimed when there is a place for it, those like it that are still queued."""
        log.info("a round begins", mode=claimed.job.mode, steps=1 + len(alike))
        others = [partial(self._run_if_queued, step_id) for step_id in alike]
        Round(engine, partial(self._run, claimed), others, draining=self._draining).run(self._places)

    def _run_if_queued(self, step_id: uuid.UUID, segmenter: Segmenter) -> None:
        with self._sessions.begin() as session:
            claimed = lifecycle.claim_step(
                session, step_id, worker_id=self._heart.worker_id, lease_seconds=self._settings.worker.lease_seconds
            )
        if claimed is not None:
            self._run(claimed, segmenter)

    def _run(self, claimed: ClaimedStep, segmenter: Segmenter | None) -> None:
        fields = {"job_id": str(claimed.job.id), "step": claimed.ordinal, "attempt": claimed.lease.attempt}
        with structlog.contextvars.bound_contextvars(**fields), self._heart.hold(claimed.lease) as hold:
            log.info("a step begins", kind=claimed.kind, mode=claimed.job.mode)
            try:
                try:
                    write = self._work(claimed, hold, segmenter)
                finally:
                    self._teller.settle(hold)
                faults.reach(f"{claimed.kind}-made")
                self._write(hold, write)
            except LeaseLost as error:
                log.warning("a step was left to another attempt", reason=str(error))
        self._hints.wake_sender()

    def _work(self, claimed: ClaimedStep, hold: Hold, segmenter: Segmenter | None) -> Write:
        """Do the step; what comes back writes down how it ended. Raises LeaseLost."""
        lease = claimed.lease
        try:
            return self._perform(claimed, hold, segmenter)
        except LeaseLost:
            raise
        except Draining:
            return lambda session: Ending(outcome=f"given back: {lifecycle.release_step(session, lease).state}")
        except Stopped:
            return lambda session: _stop(session, lease)
        except (MasklineError, InferenceError) as error:
            failure = Failure(code=error.code, detail=str(error), retryable=error.retryable)
            return self._fail(claimed, failure)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                return self._fail(
                    claimed, Failure(code="disk_full", detail="the worker's disk is full", retryable=True)
                )
            log.exception("a step met an error nobody expected")
            detail = f"the worker met an unexpected {type(error).__name__}; its log has the reason"
            return self._fail(claimed, Failure(code="internal_error", detail=detail, retryable=True))

    def _perform(self, claimed: ClaimedStep, hold: Hold, segmenter: Segmenter | None) -> Write:
        """What a step of this kind is there for. Raises what may go wrong with it."""
        total = 1 if claimed.job.kind == "image" else None

        def tell(stage: str, done: int = 0) -> None:
            self._teller.tell(Report(hold=hold, stage=stage, done=done, total=total))

        desk = Desk(storage=self._storage, settings=self._settings, checkpoint=hold.check, tell=tell)
        if claimed.kind == StepKind.INFER and claimed.job.kind == "image" and segmenter is not None:
            self._mode_loaded = claimed.job.mode
            return partial(_publish, claimed, make_result(claimed, desk, segmenter))
        if claimed.kind == StepKind.INFER and self._engine is not None:
            from worker.chunks import make_chunk  # brings FFmpeg, which the parent of this process does without

            self._mode_loaded = claimed.job.mode
            return partial(self._finish_chunk, claimed, make_chunk(claimed, desk, self._engine))
        if claimed.kind == StepKind.FETCH:
            return partial(_start, claimed, fetch(claimed, desk))
        if claimed.kind == StepKind.PROBE:
            from worker.probe import estimate_seconds_per_frame, make_plan

            with self._sessions() as session:
                expected = estimate_seconds_per_frame(session, claimed.job.mode)
            return partial(_plan, claimed, make_plan(claimed, desk, seconds_per_frame=expected))
        if claimed.kind == StepKind.FINALIZE:
            from worker.bundle import join_chunks, read_chunks

            with self._sessions() as session:
                chunks = read_chunks(session, claimed.job)
            return partial(_publish, claimed, join_chunks(claimed, desk, chunks))
        raise RuntimeError(f"a worker of the queue {self._queue_name} cannot run a step of kind {claimed.kind}")

    def _fail(self, claimed: ClaimedStep, failure: Failure) -> Write:
        log.warning("a step failed", code=failure.code, detail=failure.detail, retryable=failure.retryable)
        limit = self._settings.jobs.failed_attempts
        return lambda session: Ending(
            outcome=f"failed: {lifecycle.fail_step(session, claimed.lease, failure, failed_attempts=limit).state}"
        )

    def _finish_chunk(self, claimed: ClaimedStep, chunk: "ChunkResult", session: Session) -> Ending:
        try:
            joining = chunks.finish_chunk(
                session, claimed.lease, result=chunk.result, model=chunk.model, frames=chunk.frames
            )
        except InvalidTransition:
            return _stop(session, claimed.lease)
        except ModelChanged as error:
            session.rollback()
            return self._fail(claimed, Failure(code=error.code, detail=str(error), retryable=False))(session)
        return Ending(outcome="a chunk is done", queued=[joining] if joining else [])

    def _write(self, hold: Hold, write: Write) -> None:
        """Commit the outcome, again and again while the database is away and the lease lasts.

        A commit whose answer was lost may be tried twice: the second finds the attempt ended and raises LeaseLost.
        """
        while True:
            try:
                with self._sessions() as session:
                    ending = write(session)
                    session.commit()
            except DATABASE_AWAY as error:
                log.warning("the outcome of a step could not be written yet", error=type(error).__name__)
                time.sleep(DATABASE_PAUSE_SECONDS)
                hold.require_lease()
            else:
                faults.reach("outcome-committed")
                log.info("a step ended", outcome=ending.outcome)
                for step in ending.queued[:MOST_HINTS]:
                    self._hints.wake(step.queue, step.id)
                return


def _start(claimed: ClaimedStep, fetched: Fetched, session: Session) -> Ending:
    try:
        step = sources.finish_fetch(session, claimed.lease, kind=fetched.kind, source=fetched.source)
    except InvalidTransition:
        return _stop(session, claimed.lease)
    return Ending(outcome="fetched", queued=[step])


def _plan(claimed: ClaimedStep, plan: "Plan", session: Session) -> Ending:
    try:
        steps = chunks.plan_chunks(
            session, claimed.lease, recording=plan.recording, chunks=plan.chunks, frames=plan.frames
        )
    except InvalidTransition:
        return _stop(session, claimed.lease)
    return Ending(outcome=f"planned: {len(steps)} chunks", queued=steps)


def _publish(claimed: ClaimedStep, result: Result, session: Session) -> Ending:
    try:
        job = lifecycle.publish(
            session, claimed.lease, manifest_key=result.manifest_key, model=result.model, timing=result.timing
        )
    except InvalidTransition:
        return _stop(session, claimed.lease)
    return Ending(outcome=f"published: {job.state}")


def _stop(session: Session, lease: Lease) -> Ending:
    """Also for work that came too late: nothing of it is written, and the cancel has its way."""
    session.rollback()
    return Ending(outcome=f"stopped: {lifecycle.stop_step(session, lease).state}")
