"""The tables. Rows are read anywhere; `shared/lifecycle.py` alone writes a job's or a step's state."""

import sys
import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Enum,
    ForeignKey,
    Identity,
    Index,
    MetaData,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

if sys.version_info >= (3, 14):
    from uuid import uuid7 as create_id
else:
    from uuid_utils.compat import uuid7 as create_id

__all__ = [
    "ApiKey", "Base", "Batch", "DeliveryState", "IdempotencyKey", "Job", "JobEvent", "JobState", "Step", "StepKind",
    "StepState", "Tenant", "Upload", "WebhookAttempt", "WebhookDelivery", "WebhookEndpoint", "Worker", "create_id",
]  # fmt: skip


class JobState(StrEnum):
    QUEUED = "queued"  # → running · canceled · expired
    RUNNING = "running"  # → succeeded · failed · canceled
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # → queued, by retry
    CANCELED = "canceled"  # → queued, by retry
    EXPIRED = "expired"  # → queued, by retry

    @property
    def is_terminal(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


class StepState(StrEnum):
    QUEUED = "queued"  # → running · canceled
    RUNNING = "running"  # → done · failed · canceled · queued, when its worker is lost, draining or in trouble
    DONE = "done"
    FAILED = "failed"  # → queued, by retry
    CANCELED = "canceled"  # → queued, by retry


class StepKind(StrEnum):
    FETCH = "fetch"
    PROBE = "probe"
    INFER = "infer"
    FINALIZE = "finalize"


class DeliveryState(StrEnum):
    PENDING = "pending"  # → delivered · failed
    DELIVERED = "delivered"  # → pending, by redelivery
    FAILED = "failed"  # → pending, by redelivery


def _one_of(column: str, values: type[StrEnum]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


# Thousands are inserted in one go. To read back what the database fills in takes one statement with all their values,
# which the driver parses anew each time; without that, it prepares one for a single row.
_MANY_AT_ONCE = {"eager_defaults": False}


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB(none_as_null=True),
        list[str]: ARRAY(Text),
        str: Text,
        StrEnum: Enum(
            StrEnum, native_enum=False, length=16, values_callable=lambda kind: [each.value for each in kind]
        ),
    }


class Tenant(Base):
    __tablename__ = "tenants"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    name: Mapped[str] = mapped_column(unique=True)
    webhook_secret: Mapped[str]
    """Signs callbacks to the URL a job names itself; registered endpoints have secrets of their own."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    keep_results_seconds: Mapped[float | None]
    """Of its jobs, after their end; none is what the settings say, as for the sources."""
    keep_sources_seconds: Mapped[float | None]
    swept_at: Mapped[datetime | None]
    """When all that it has in the storage was last compared with what is known here."""
    swept_to: Mapped[str | None]
    """How far a comparison that is not done yet has come: the last key."""


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    """The key id inside `mk_<id>_<secret><checksum>`; the secret itself is never stored."""
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    secret_sha256: Mapped[bytes]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Upload(Base):
    __tablename__ = "uploads"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    filename: Mapped[str]
    content_type: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    storage_key: Mapped[str]
    etag: Mapped[str | None]
    """Set at completion; from then on the object is read only while it still has this ETag."""
    kind: Mapped[str | None]
    """Of job that it is for, which its first bytes said at completion."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    part_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """The size of every part but the last; none where one PUT brings the whole file."""
    multipart_id: Mapped[str | None]
    """What the storage calls the upload of the parts."""
    completed_at: Mapped[datetime | None]
    expires_at: Mapped[datetime] = mapped_column(index=True)
    """After this no job may name it; its bytes stay for those that have, see `shared/retention.py`."""
    deleted_at: Mapped[datetime | None]


class Batch(Base):
    __tablename__ = "batches"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    name: Mapped[str]
    mode: Mapped[str]
    options: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any]] = mapped_column("metadata", server_default="{}")
    priority: Mapped[int] = mapped_column(server_default="0")
    webhook_url: Mapped[str | None]
    jobs_left: Mapped[int] = mapped_column(server_default="0")
    """How many of its jobs have not ended; the one that ends the last of them finishes the batch."""
    totals: Mapped[dict[str, Any] | None]
    """What its jobs came to when it was finished, which outlives them."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    opened_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """Its creation, or when a retry reopened it last; speed is measured from then on."""
    finished_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        Index("ix_batches_newest", "tenant_id", text("created_at DESC"), text("id DESC")),
        Index("ix_batches_deleted_at", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
    )


class Job(Base):
    __tablename__ = "jobs"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    batch_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("batches.id", ondelete="SET NULL"), index=True)
    upload_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("uploads.id", ondelete="SET NULL"), index=True)
    state: Mapped[JobState]
    kind: Mapped[str | None]
    """None until a source that has to be fetched was."""
    mode: Mapped[str]
    options: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any]] = mapped_column("metadata")
    """The customer's own metadata; the attribute has another name because SQLAlchemy owns that one."""
    priority: Mapped[int]
    source: Mapped[dict[str, Any]]
    """{"key", "etag", "size_bytes", "filename"} of an object in the storage, or as `shared/sources.py` says."""
    webhook_url: Mapped[str | None]
    ends: Mapped[int] = mapped_column(server_default="0")
    """How often it has ended, which is more than once after a retry; the sequence number of the news of its end."""
    attempts: Mapped[int] = mapped_column(server_default="0")
    stage: Mapped[str | None]
    frames_done: Mapped[int] = mapped_column(server_default="0")
    frames_total: Mapped[int | None]
    recording: Mapped[dict[str, Any] | None]
    """What the probe found out about a recording, for all that comes after it."""
    chunks_left: Mapped[int | None]
    """How many chunks of a recording are not done; the one that ends the last of them adds the step that joins them."""
    progress_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    model: Mapped[dict[str, Any] | None]
    timing: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    manifest_key: Mapped[str | None]
    """The one thing readers trust: a result exists when this names it."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    queued_at: Mapped[datetime] = mapped_column(server_default=func.now())
    start_by: Mapped[datetime]
    stop_by: Mapped[datetime | None]
    start_deadline_seconds: Mapped[float]
    run_timeout_seconds: Mapped[float]
    keep_seconds: Mapped[float]
    keep_source_seconds: Mapped[float | None]
    """None, or more than `keep_seconds`: its source goes with its result."""
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    source_expires_at: Mapped[datetime | None]
    """When our copy of its source goes: none until it has ended, and where there is none of ours."""
    source_removed_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    __mapper_args__ = _MANY_AT_ONCE
    __table_args__ = (
        _one_of("state", JobState),
        CheckConstraint("(manifest_key IS NOT NULL) = (state = 'succeeded')", name="manifest_when_succeeded"),
        CheckConstraint("(error IS NOT NULL) = (state IN ('failed', 'expired'))", name="error_when_failed"),
        Index("ix_jobs_newest", "tenant_id", text("created_at DESC"), text("id DESC")),
        Index("ix_jobs_state_newest", "tenant_id", "state", text("created_at DESC"), text("id DESC")),
        Index("ix_jobs_start_by", "start_by", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_stop_by", "stop_by", postgresql_where=text("state = 'running'")),
        Index("ix_jobs_expires_at", "expires_at"),
        Index(
            "ix_jobs_source_expires_at", "source_expires_at",
            postgresql_where=text("source_removed_at IS NULL AND source_expires_at < expires_at"),
        ),
        Index("ix_jobs_deleted_at", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
    )  # fmt: skip


class Step(Base):
    """The unit that is claimed, leased, retried and resumed."""

    __tablename__ = "steps"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    tenant_id: Mapped[uuid.UUID]
    ordinal: Mapped[int]
    kind: Mapped[StepKind]
    queue: Mapped[str]
    mode: Mapped[str]
    priority: Mapped[int]
    state: Mapped[StepState]
    attempt: Mapped[int] = mapped_column(server_default="0")
    """The fencing token: rises at every claim, never falls, and every write of a running step names it."""
    lost: Mapped[int] = mapped_column(server_default="0")
    failures: Mapped[int] = mapped_column(server_default="0")
    worker_id: Mapped[uuid.UUID | None]
    lease_expires_at: Mapped[datetime | None]
    run_after: Mapped[datetime] = mapped_column(server_default=func.now())
    hint_at: Mapped[datetime] = mapped_column(server_default=func.now())
    """When upkeep wakes a worker for this step, should it still be queued."""
    plan: Mapped[dict[str, Any] | None]
    """Which part of a recording this step makes."""
    frames_done: Mapped[int] = mapped_column(server_default="0")
    """Of this attempt, or of the last; the job's own number is the sum over its steps."""
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    __mapper_args__ = _MANY_AT_ONCE
    __table_args__ = (
        _one_of("state", StepState),
        _one_of("kind", StepKind),
        CheckConstraint("(lease_expires_at IS NOT NULL) = (state = 'running')", name="lease_when_running"),
        Index("uq_steps_job_ordinal", "job_id", "ordinal", unique=True),
        Index(
            "ix_steps_claim",
            "queue", "tenant_id", "mode", text("priority DESC"), "id",
            postgresql_where=text("state = 'queued'"),
        ),
        # For workers of the version before alone.
        Index("ix_steps_oldest", "queue", "id", postgresql_where=text("state = 'queued'")),
        Index("ix_steps_oldest_of_mode", "queue", "mode", "id", postgresql_where=text("state = 'queued'")),
        Index("ix_steps_hint_at", "hint_at", postgresql_where=text("state = 'queued'")),
        Index("ix_steps_lease", "lease_expires_at", postgresql_where=text("state = 'running'")),
    )  # fmt: skip


class JobEvent(Base):
    __tablename__ = "job_events"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    type: Mapped[str]
    """`state`, `progress` or `attempt`."""
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())

    __table_args__ = (Index("ix_job_events_job_id_id", "job_id", "id"),)


class WebhookEndpoint(Base):
    """A URL that a tenant registered, to be told of what happens to any of its jobs and batches."""

    __tablename__ = "webhook_endpoints"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    url: Mapped[str]
    description: Mapped[str | None]
    events: Mapped[list[str]]
    """The types that it is told of; none stands for all, those to come included."""
    secret: Mapped[str]
    old_secrets: Mapped[list[dict[str, Any]]] = mapped_column(JSONB, server_default="[]")
    """[{"secret", "until"}] of those that a rotation replaced, which sign along until then."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]
    """`asked`, `gone` or `failing`."""
    failing_since: Mapped[datetime | None]
    """The first of its failures that no success has followed."""
    paused_until: Mapped[datetime | None]
    """What it asked for by Retry-After."""
    deleted_at: Mapped[datetime | None]
    """It is disabled as well by then; its deliveries go in slices, and it with the last of them."""


class WebhookDelivery(Base):
    """One event on its way to one URL, the exact bytes stored so that what is signed is what was recorded."""

    __tablename__ = "webhook_deliveries"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"), index=True)
    endpoint_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    url: Mapped[str]
    """Of an endpoint, the one that it had then; it is sent to the one that it has."""
    lane: Mapped[str] = mapped_column(server_default="")
    """Whose trouble it shares: the endpoint's id, or the tenant and the host of a job's own URL."""
    type: Mapped[str]
    body: Mapped[str]
    state: Mapped[DeliveryState]
    attempt: Mapped[int] = mapped_column(server_default="0")
    """The fencing token: rises at every claim, never falls, and every outcome names it."""
    attempts_before: Mapped[int] = mapped_column(server_default="0")
    """The last redelivery; the schedule counts from there."""
    next_attempt_at: Mapped[datetime | None] = mapped_column(server_default=func.now())
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    __table_args__ = (
        _one_of("state", DeliveryState),
        Index("ix_webhook_deliveries_due", "next_attempt_at", postgresql_where=text("state = 'pending'")),
        Index("ix_webhook_deliveries_lane", "lane", "next_attempt_at", postgresql_where=text("state = 'pending'")),
        Index("ix_webhook_deliveries_newest", "tenant_id", text("created_at DESC"), text("id DESC")),
        Index("ix_webhook_deliveries_endpoint", "endpoint_id", text("created_at DESC"), text("id DESC")),
        Index("ix_webhook_deliveries_finished_at", "finished_at"),
    )


class WebhookAttempt(Base):
    """What came of sending a delivery once; the newest of each are kept."""

    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[uuid.UUID] = mapped_column(
        ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    status: Mapped[int | None]
    error: Mapped[str | None]
    latency_seconds: Mapped[float]
    reply: Mapped[str | None]
    """The beginning of what the receiver answered, as text."""
    ended_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Worker(Base):
    """One process that claims steps, as it described itself at its last heartbeat."""

    __tablename__ = "workers"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=create_id)
    host: Mapped[str]
    pid: Mapped[int]
    mark: Mapped[str | None]
    """By it, others on its machine can tell that its process is gone (`worker/relief.py`)."""
    queue: Mapped[str]
    device: Mapped[str]
    memory_bytes: Mapped[int] = mapped_column(BigInteger)
    modes: Mapped[list[str]]
    mode_loaded: Mapped[str | None]
    step_id: Mapped[uuid.UUID | None]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)


class IdempotencyKey(Base):
    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[bytes]
    locked_until: Mapped[datetime]
    """A request that died between taking the key and its answer gives it up at this time."""
    job_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    batch_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("batches.id", ondelete="CASCADE"))
    """It stands for a job or for a batch; for neither while its first request is in flight."""
    expires_at: Mapped[datetime] = mapped_column(index=True)

    __table_args__ = (  # or the end of every job and batch would look through all keys there are
        Index("ix_idempotency_keys_job_id", "job_id", postgresql_where=text("job_id IS NOT NULL")),
        Index("ix_idempotency_keys_batch_id", "batch_id", postgresql_where=text("batch_id IS NOT NULL")),
    )
