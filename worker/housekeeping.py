"""Housekeeping: what is over, or was deleted, goes with its files. `shared/retention.py` says in which steps, and why.

Each chore is idempotent, takes its work in slices, and goes on until nothing is left or it has had its time, so that
the others have theirs. Any number of these processes may run. Nothing here is urgent, and a storage that hangs holds
it up for long: it runs on a thread of its own beside upkeep's chores.
"""

import threading
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import structlog
from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Delete,
    Select,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.orm import Session

from shared import batches, deliveries, endpoints, faults, retention
from shared.config import Settings
from shared.db import SessionFactory
from shared.errors import MasklineError
from shared.models import Batch, IdempotencyKey, Job, JobEvent, Step, StepState, Upload, Worker
from shared.storage import Storage, job_prefix

log = structlog.get_logger(__name__)

AT_ONCE = 100
"""Jobs or uploads whose files go together, before their rows do."""
ROWS_AT_ONCE = 5000
"""Of a kind that many belong to one; far from the statement timeout."""
DELETERS = 8
"""Fewer than the storage's client has connections."""
CHORE_SECONDS = 20.0

Slice = Callable[[], bool]
"""Does some of the work; whether there may be more."""


@dataclass(frozen=True, kw_only=True)
class Housekeeping:
    settings: Settings
    sessions: SessionFactory
    storage: Storage
    stopping: threading.Event = field(default_factory=threading.Event)

    def chores(self) -> Sequence[Callable[[], None]]:
        return (
            self.finish_deletions,
            self.purge_jobs,
            self.purge_sources,
            self.purge_uploads,
            self.forget_endpoints,
            self.forget_deliveries,
            self.forget_keys,
            self.forget_workers,
        )

    def finish_deletions(self) -> None:
        """Of batches: whoever deletes one may die, and jobs that run end when their workers hear of it."""
        with self.sessions() as session:
            deleted = session.scalars(select(Batch.id).where(Batch.deleted_at.is_not(None))).all()
        for batch_id in deleted:
            batches.delete_jobs(self.sessions, batch_id)
            with self.sessions.begin() as session:
                delete_empty_batches(session, [batch_id])

    def purge_jobs(self) -> None:
        """Remove jobs deleted or past their retention, once none of their steps runs; with the last of a batch, it."""
        self._go_on(self._purge_some_jobs)

    def purge_sources(self) -> None:
        """Remove the sources that go before the results."""
        self._go_on(self._purge_some_sources)

    def purge_uploads(self) -> None:
        """Remove uploads past their time, and those deleted, that no job needs any more."""
        self._go_on(self._purge_some_uploads)

    def forget_endpoints(self) -> None:
        """Webhook endpoints that were deleted, after all that was ever sent to them."""
        self._go_on(lambda: self._write(endpoints.forget_deleted))

    def forget_deliveries(self) -> None:
        """Webhooks that ended long ago."""
        keep_seconds = self.settings.webhooks.keep_seconds
        self._go_on(lambda: self._write(lambda session: deliveries.forget(session, keep_seconds=keep_seconds)))

    def forget_keys(self) -> None:
        """Idempotency-Keys past their time."""
        key = IdempotencyKey
        late = select(key.tenant_id, key.key).where(key.expires_at < func.now()).limit(ROWS_AT_ONCE)
        these = delete(key).where(tuple_(key.tenant_id, key.key).in_(late.with_for_update(skip_locked=True)))
        self._go_on(lambda: self._write(lambda session: _count_deleted(session, these) == ROWS_AT_ONCE))

    def forget_workers(self) -> None:
        """Rows of workers long silent."""
        gone = func.now() - timedelta(seconds=self.settings.upkeep.worker_gone_seconds)
        with self.sessions.begin() as session:
            session.execute(delete(Worker).where(Worker.heartbeat_at < gone))

    # --- a slice of each -------------------------------------------------------------------------------------------

    def _purge_some_jobs(self) -> bool:
        over = or_(Job.deleted_at.is_not(None), Job.expires_at < func.now()) & ~has_running_step()
        rows = self._look(select(Job).where(over).with_for_update(key_share=True, skip_locked=True))
        done = self._delete_files({job.id: job_prefix(job.tenant_id, job.id) for job in rows})
        ids = sorted(done.gone)
        for table in (JobEvent, Step):
            delete_in_slices(self.sessions, table, table.job_id.in_(ids))
        with self.sessions.begin() as session:
            session.execute(select(Job.id).where(Job.id.in_(ids)).order_by(Job.id).with_for_update())
            session.execute(delete(Job).where(Job.id.in_(ids), over))
            delete_empty_batches(session, {job.batch_id for job in rows if job.batch_id is not None})
        if ids:
            log.info("jobs were removed with their files", count=len(ids), job_ids=[str(each) for each in ids[:10]])
        done.tell()
        return len(rows) == AT_ONCE

    def _purge_some_sources(self) -> bool:
        over = (
            Job.source_removed_at.is_(None),
            Job.source_expires_at < Job.expires_at,
            Job.source_expires_at < func.now(),
            Job.deleted_at.is_(None),
            ~has_running_step(),
        )
        rows = self._look(select(Job).where(*over).with_for_update(key_share=True, skip_locked=True))
        own = {job.id: job.source["key"] for job in rows if _is_own(job)}
        done = self._delete_files(own)
        removed = [job.id for job in rows if job.id in done.gone or job.id not in own]
        named = [job.upload_id for job in rows if job.id in removed and job.upload_id is not None]
        early = update(Upload).where(Upload.id.in_(named), Upload.expires_at > func.now())
        with self.sessions.begin() as session:
            session.execute(early.values(expires_at=func.now()).execution_options(synchronize_session=False))
            for job in session.scalars(select(Job).where(Job.id.in_(removed)).order_by(Job.id).with_for_update()):
                job.source_removed_at = func.now()
        done.tell()
        return len(rows) == AT_ONCE

    def _purge_some_uploads(self) -> bool:
        over = retention.is_over()
        with self.sessions.begin() as session:
            some = select(Upload.id).where(over).limit(AT_ONCE).with_for_update(skip_locked=True)
            locked = session.scalars(some).all()
            # Looked at again: a job may have named one after the first look, and let go of it before it was locked.
            rows = session.scalars(select(Upload).where(Upload.id.in_(locked), over)).all()
        done = self._delete_files({upload.id: upload.storage_key for upload in rows})
        with self.sessions.begin() as session:
            session.execute(delete(Upload).where(Upload.id.in_(done.gone)))
        done.tell()
        return len(locked) == AT_ONCE

    # --- shared by the above ---------------------------------------------------------------------------------------

    def _go_on(self, do_some: Slice) -> None:
        ends_at = time.monotonic() + CHORE_SECONDS
        while do_some() and time.monotonic() < ends_at and not self.stopping.is_set():
            continue

    def _write(self, write: Callable[[Session], bool]) -> bool:
        with self.sessions.begin() as session:
            return write(session)

    def _look(self, over: Select[tuple[Job]]) -> Sequence[Job]:
        """From here on it is too late for a retry; one that came before has changed what is looked at."""
        with self.sessions.begin() as session:
            return session.scalars(over.limit(AT_ONCE)).all()

    def _delete_files(self, prefixes: dict[uuid.UUID, str]) -> "_Deleted":
        """All that can be: one that fails holds up no other."""
        done = _Deleted(gone=set(), errors=[])
        if not prefixes:
            return done
        with ThreadPoolExecutor(DELETERS, thread_name_prefix="delete") as pool:
            deleting = {owner: pool.submit(self.storage.delete_prefix, prefix) for owner, prefix in prefixes.items()}
        for owner, each in deleting.items():
            error = each.exception()
            if error is None:
                done.gone.add(owner)
            elif isinstance(error, MasklineError):
                done.errors.append(error)
            else:
                raise error
        if done.gone:
            faults.reach("files-purged")
        return done


@dataclass(frozen=True, kw_only=True)
class _Deleted:
    gone: set[uuid.UUID]
    errors: list[MasklineError]

    def tell(self) -> None:
        """Raises the first error there was."""
        if self.errors:
            raise self.errors[0]


def has_running_step() -> ColumnElement[bool]:
    """Of a job, which may have ended all the same: what the step stores may yet be named."""
    return exists().where(Step.job_id == Job.id, Step.state == StepState.RUNNING)


def _is_own(job: Job) -> bool:
    """Whether its source lies among its own files, and not in an upload that others may read."""
    return "bucket" not in job.source and str(job.source["key"]).startswith(job_prefix(job.tenant_id, job.id))


def delete_in_slices(sessions: SessionFactory, table: type[JobEvent] | type[Step], *which: ColumnElement[bool]) -> None:
    """All of them, each slice in a transaction of its own."""
    some = select(table.id).where(*which).limit(ROWS_AT_ONCE).scalar_subquery()
    more = True
    while more:
        with sessions.begin() as session:
            more = _count_deleted(session, delete(table).where(table.id.in_(some))) == ROWS_AT_ONCE


def delete_empty_batches(session: Session, batch_ids: Collection[uuid.UUID]) -> None:
    """Those of them that have no job any more. They are locked first: of two that take the last jobs away, the second
    sees what the first has done."""
    locked = select(Batch.id).where(Batch.id.in_(batch_ids)).order_by(Batch.id).with_for_update()
    wanted = session.scalars(locked).all()
    session.execute(delete(Batch).where(Batch.id.in_(wanted), ~exists().where(Job.batch_id == Batch.id)))


def _count_deleted(session: Session, these: Delete) -> int:
    result = session.execute(these.execution_options(synchronize_session=False))
    return cast("CursorResult[Any]", result).rowcount
