"""The sweep: every few hours, all that lies in the storage is compared with what the database knows.

What nobody names any more and is older than a grace period goes: files whose row never came, because its writer died
before or its transaction failed; what dead attempts of jobs had stored; bytes of uploads that came after their upload
was removed; uploads in parts that nobody will complete. Whatever any row names stays, and everything of a job that has
not ended, since what it stores is named later. Of what is there by a key that no part of Maskline makes, nothing is
touched, and nothing below a tenant that is not known: rather an orphan too many than the files of another database.

Keys are listed before rows are read, so that a file whose row came in between is found named. One process sweeps at a
time, tenant by tenant and page by page, and notes how far it is: the next one goes on from there. Two at once would do
no harm.
"""

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import structlog
from sqlalchemy import ColumnElement, exists, func, or_, select, text, tuple_, update

from shared.config import Settings, Upkeep
from shared.db import SessionFactory
from shared.errors import SourceMissing
from shared.models import Batch, Job, JobEvent, Step, Tenant, Upload
from shared.multipart import Begun
from shared.storage import ListedObject, Storage, job_prefix, tenant_prefix
from worker.housekeeping import delete_empty_batches, delete_in_slices, has_running_step

log = structlog.get_logger(__name__)

LOCK = 0x73776565
"""The same in every version, or an old and a new one would sweep at once."""
JOBS_AT_ONCE = 500
MANIFEST_BYTES = 64 * 2**20
_OWNER = re.compile(r"tenants/[^/]+/(jobs|uploads)/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:$|/)")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    settings: Settings
    sessions: SessionFactory
    storage: Storage
    stopping: threading.Event = field(default_factory=threading.Event)

    def chores(self) -> Sequence[Callable[[], None]]:
        return (self.sweep,)

    def sweep(self) -> None:
        """All tenants whose turn it is, unless another process is at it."""
        with self._alone() as alone:
            while alone and not self.stopping.is_set():
                with self.sessions() as session:
                    due = or_(Tenant.swept_at.is_(None), Tenant.swept_at < self._ago(self._limits.sweep_seconds))
                    first = Tenant.swept_at.asc().nulls_first(), Tenant.id
                    tenant = session.scalar(select(Tenant).where(due).order_by(*first).limit(1))
                if tenant is None:
                    return
                self.sweep_tenant(tenant)

    def sweep_tenant(self, tenant: Tenant) -> None:
        if tenant.swept_to is None:
            self._end_begun(tenant.id)
            self._forget_progress(tenant.id)
            self._forget_batches(tenant.id)
        removed = 0
        for page in self.storage.list_pages(tenant_prefix(tenant.id), after=tenant.swept_to or ""):
            removed += self._sweep_page(tenant.id, page)
            if page:
                self._note(tenant.id, swept_to=page[-1].key)
            if self.stopping.is_set():
                return
        self._note(tenant.id, swept_to=None, swept_at=func.now())
        log.info("the files of a tenant were swept", tenant_id=str(tenant.id), removed=removed)

    def _sweep_page(self, tenant_id: uuid.UUID, page: Sequence[ListedObject]) -> int:
        old = [each for each in page if each.age_seconds > self._limits.sweep_grace_seconds]
        orphans = self._find_orphans(tenant_id, [each.key for each in old])
        for key in orphans:
            self.storage.delete(key)
            log.info("a file that nothing names was removed", key=key)
        return len(orphans)

    def _end_begun(self, tenant_id: uuid.UUID) -> None:
        """Uploads in parts that nobody will complete; what is begun is not named by anybody but its owner."""
        for page in self.storage.multipart.list_begun(tenant_prefix(tenant_id)):
            old = [each for each in page if each.age_seconds > self._limits.sweep_grace_seconds]
            for each in self._find_ownerless(old):
                self.storage.multipart.abort_one(each)
                log.info("an upload in parts that nobody will complete was given up", key=each.key)

    def _forget_progress(self, tenant_id: uuid.UUID) -> None:
        """Of jobs that ended long enough ago, the events that say how far they were: by far the most there are, and of
        use only to whoever follows a job. What became of it and of its attempts is told for as long as it is there."""
        over = Job.tenant_id == tenant_id, Job.finished_at < self._ago(self._limits.sweep_grace_seconds)
        place = tuple_(Job.created_at, Job.id)
        after: tuple[Any, Any] | None = None
        while not self.stopping.is_set():
            wanted = select(Job.created_at, Job.id).where(*over).order_by(Job.created_at, Job.id).limit(JOBS_AT_ONCE)
            with self.sessions() as session:
                rows = session.execute(wanted if after is None else wanted.where(place > after)).all()
            if not rows:
                return
            after = (rows[-1].created_at, rows[-1].id)
            told = JobEvent.job_id.in_([row.id for row in rows]), JobEvent.type == "progress"
            delete_in_slices(self.sessions, JobEvent, *told)

    def _forget_batches(self, tenant_id: uuid.UUID) -> None:
        """Those that lost their jobs to a version which left them behind."""
        empty = Batch.tenant_id == tenant_id, ~exists().where(Job.batch_id == Batch.id)
        more = True
        while more:
            with self.sessions.begin() as session:
                ids = session.scalars(select(Batch.id).where(*empty).limit(JOBS_AT_ONCE)).all()
                delete_empty_batches(session, ids)
                more = len(ids) == JOBS_AT_ONCE

    # --- what is named ---------------------------------------------------------------------------------------------

    def _find_orphans(self, tenant_id: uuid.UUID, keys: Sequence[str]) -> list[str]:
        """Those of the keys that nothing names."""
        jobs, uploads = _sort_by_owner(keys)
        there = self._find_uploads(list(uploads))
        orphans = [key for owner, its in uploads.items() if owner not in there for key in its]
        rows = self._find_jobs(list(jobs))
        for job_id, its in jobs.items():
            row = rows.get(job_id)
            if row is None:
                orphans += its
            elif row.ended:
                orphans += self._find_unnamed(tenant_id, row.job, its)
        return orphans

    def _find_unnamed(self, tenant_id: uuid.UUID, job: Job, keys: Sequence[str]) -> list[str]:
        """Of a job that has ended. What is looked up goes from what costs nothing to what costs most, and mostly the
        first is enough: the attempt that published wrote nothing but what its manifest names."""
        published = job.manifest_key.rpartition("/")[0] + "/" if job.manifest_key else None
        named = _collect([job.source, job.recording], job_prefix(tenant_id, job.id))
        left = [key for key in keys if key not in named and not (published and key.startswith(published))]
        if not left:
            return []
        with self.sessions() as session:
            steps = session.execute(select(Step.plan, Step.result).where(Step.job_id == job.id)).all()
        named |= _collect([list(row) for row in steps], job_prefix(tenant_id, job.id))
        left = [key for key in left if key not in named]
        if left and job.manifest_key:
            try:
                manifest = json.loads(self.storage.read(job.manifest_key, limit_bytes=MANIFEST_BYTES))
            except (SourceMissing, ValueError) as error:  # it may be just being removed, with all that it has
                log.warning("a manifest could not be read", key=job.manifest_key, error=type(error).__name__)
                return []
            named |= _collect(manifest, job_prefix(tenant_id, job.id))
        return [key for key in left if key not in named]

    def _find_ownerless(self, begun: Sequence[Begun]) -> list[Begun]:
        jobs, uploads = _sort_by_owner([each.key for each in begun])
        rows, there = self._find_jobs(list(jobs)), self._find_uploads(list(uploads))
        going_on = {key for owner, its in jobs.items() if owner in rows and not rows[owner].ended for key in its}
        kept = going_on | {key for owner, its in uploads.items() if owner in there for key in its}
        return [each for each in begun if _OWNER.match(each.key) and each.key not in kept]

    def _find_jobs(self, ids: Sequence[uuid.UUID]) -> "dict[uuid.UUID, _Owner]":
        with self.sessions() as session:
            rows = session.execute(select(Job, has_running_step()).where(Job.id.in_(ids))).all()
        return {job.id: _Owner(job=job, ended=job.state.is_terminal and not runs) for job, runs in rows}

    def _find_uploads(self, ids: Sequence[uuid.UUID]) -> set[uuid.UUID]:
        with self.sessions() as session:
            return set(session.scalars(select(Upload.id).where(Upload.id.in_(ids))))

    # --- the rest --------------------------------------------------------------------------------------------------

    @property
    def _limits(self) -> Upkeep:
        return self.settings.upkeep

    def _note(self, tenant_id: uuid.UUID, **values: Any) -> None:
        with self.sessions.begin() as session:
            session.execute(update(Tenant).where(Tenant.id == tenant_id).values(values))

    def _ago(self, seconds: float) -> ColumnElement[Any]:
        return func.now() - timedelta(seconds=seconds)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else sweeps. The lock goes with its connection, and so with the process."""
        with self.sessions.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")  # or it would be idle in a transaction
            taken = bool(connection.scalar(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": LOCK}))
            try:
                yield taken
            finally:
                if taken:
                    connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})


@dataclass(frozen=True, kw_only=True)
class _Owner:
    job: Job
    ended: bool
    """And none of its steps runs, that could still give a file a name."""


def _sort_by_owner(keys: Sequence[str]) -> tuple[dict[uuid.UUID, list[str]], dict[uuid.UUID, list[str]]]:
    """By job and by upload; a key of any other form is left out."""
    found: dict[str, dict[uuid.UUID, list[str]]] = {"jobs": {}, "uploads": {}}
    for key in keys:
        if owner := _OWNER.match(key):
            found[owner[1]].setdefault(uuid.UUID(owner[2]), []).append(key)
    return found["jobs"], found["uploads"]


def _collect(value: Any, prefix: str) -> set[str]:
    """Every key that is anywhere in it, however deep."""
    if isinstance(value, str):
        return {value} if value.startswith(prefix) else set()
    if isinstance(value, dict):
        value = list(value.values())
    return {key for each in value for key in _collect(each, prefix)} if isinstance(value, list) else set()
