"""How long results and sources are kept: what a tenant has decided, and which sources are there to be read.

A job takes the rules of its tenant over when it is submitted, and what it says at its end stays true. Its source may go
before its result, never after it. An upload may be the source of many jobs: it goes with the last of them.

Removal takes three steps, so that whoever dies in between leaves something that can be finished. What is over is looked
at under a lock, which whoever would use it again takes as well, and sees by the clock that it is too late. Then the
files go, and then the row, or a note in it. The work is done by `worker/housekeeping.py`.
"""

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, case, func, select
from sqlalchemy.orm import Session

from shared.config import Jobs
from shared.errors import NotFound
from shared.models import Job, JobState, Tenant, Upload
from shared.storage import uploads_prefix
from shared.tenants import Caller


@dataclass(frozen=True, kw_only=True)
class Policy:
    results_seconds: float
    sources_seconds: float | None
    """None: as long as the results."""

    @property
    def upload_seconds(self) -> float:
        """Of an upload that no job has named yet."""
        return self.results_seconds if self.sources_seconds is None else self.sources_seconds


def read_policy(tenant: Tenant | Caller, defaults: Jobs) -> Policy:
    """What the tenant has decided, and for the rest what the settings say."""
    results, sources = tenant.keep_results_seconds, tenant.keep_sources_seconds
    return Policy(
        results_seconds=defaults.keep_seconds if results is None else results,
        sources_seconds=defaults.keep_sources_seconds if sources is None else sources,
    )


def keep_source() -> ColumnElement[timedelta | None]:
    """How long the source of a job is kept after its end; NULL where no copy of it is ours."""
    seconds = func.least(func.coalesce(Job.keep_source_seconds, Job.keep_seconds), Job.keep_seconds)
    ours = Job.source.has_key("key") & ~Job.source.has_key("bucket")
    return case((ours, func.make_interval(0, 0, 0, 0, 0, 0, seconds)), else_=None)


def find_readable(session: Session, jobs: Sequence[Job], uploads: Collection[uuid.UUID]) -> list[uuid.UUID]:
    """Those whose source will be there as long as they are not ended again. The jobs are locked, and before them what
    is left of their uploads."""
    now = session.scalars(select(func.clock_timestamp())).one()
    return [job.id for job in jobs if _lasts(job, now) and (job.upload_id in uploads or not _was_uploaded(job))]


def hold_upload(upload_id: ColumnElement[uuid.UUID]) -> Select[tuple[uuid.UUID]]:
    """For a job that is just submitted: the upload does not go before the transaction ends, nor while the job reads it.
    Finds nothing when it is too late for that."""
    return _hold(Upload.id == upload_id)


def hold_uploads(session: Session, upload_ids: Collection[uuid.UUID]) -> None:
    """As `hold_upload`, of many. Raises NotFound when it is too late for one."""
    if not upload_ids:
        return
    if len(session.scalars(_hold(Upload.id.in_(upload_ids)).order_by(Upload.id)).all()) < len(upload_ids):
        raise NotFound("there is no such upload any more")


def is_over() -> ColumnElement[bool]:
    """Of an upload: nobody may name it any more, no unfinished job reads it, and unless it was deleted, no job that has
    ended may be tried again with it."""
    reading = Job.state.in_([JobState.QUEUED, JobState.RUNNING])
    promised = Job.deleted_at.is_(None) & (Job.source_expires_at > func.now())
    of_it = select(Job.id).where(Job.upload_id == Upload.id)
    wanted = of_it.where(reading).exists() | (Upload.deleted_at.is_(None) & of_it.where(promised).exists())
    return (Upload.expires_at < func.now()) & ~wanted


def _hold(wanted: ColumnElement[bool]) -> Select[tuple[uuid.UUID]]:
    current = Upload.deleted_at.is_(None), Upload.expires_at > func.clock_timestamp()
    return select(Upload.id).where(wanted, *current).with_for_update(read=True, key_share=True)


def _lasts(job: Job, now: datetime) -> bool:
    ends = [each for each in (job.expires_at, job.source_expires_at) if each is not None]
    return job.source_removed_at is None and all(each > now for each in ends)


def _was_uploaded(job: Job) -> bool:
    """An upload that was removed takes its name out of the jobs, but not its key."""
    key = job.source.get("key", "")
    return job.upload_id is not None or ("bucket" not in job.source and key.startswith(uploads_prefix(job.tenant_id)))
