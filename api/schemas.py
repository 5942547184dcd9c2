"""Request bodies and pages. What jobs look like is `shared/contract.py`."""

import json
import math
import uuid
from datetime import datetime
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from shared.contract import Batch, Job, JobKind, ModeName, Options
from shared.models import DeliveryState
from shared.multipart import MOST_PARTS
from shared.sources import Place
from shared.webhooks import EventName

METADATA_BYTES = 16_000
METADATA_DEPTH = 16
URL_LENGTH = 2048
PARTS_AT_ONCE = 100
NAME_LENGTH = 200
BATCH_ITEMS = 10_000
BATCH_PRIORITY = -10
"""Of a batch that does not say its own: whoever waits for a single job does not wait for ten thousand others first."""


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_storable(value: Any, *, depth: int = 0) -> Any:
    """Postgres stores neither NUL nor half a surrogate pair, and JSON has no infinity."""
    if depth > METADATA_DEPTH:
        raise ValueError(f"is nested deeper than {METADATA_DEPTH} levels")
    if isinstance(value, str) and ("\x00" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        raise ValueError("has a NUL character or a lone surrogate")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("has a number that is not finite")
    if isinstance(value, dict):
        for key, each in value.items():
            _check_storable(key, depth=depth)
            _check_storable(each, depth=depth + 1)
    if isinstance(value, list):
        for each in value:
            _check_storable(each, depth=depth + 1)
    return value


def _check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    _check_storable(value)
    if len(json.dumps(value).encode()) > METADATA_BYTES:
        raise ValueError(f"is larger than {METADATA_BYTES} bytes")
    return value


def _check_url(value: str) -> str:
    try:
        parts = urlsplit(_check_storable(value))
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or port == 0:
        raise ValueError("must be an http or https URL with a host and without a user name")
    return value


def _check_s3_url(value: str) -> str:
    return str(Place.parse(value))


Metadata = Annotated[dict[str, Any], AfterValidator(_check_metadata)]
WebhookUrl = Annotated[str, Field(max_length=URL_LENGTH), AfterValidator(_check_url)]
S3Url = Annotated[str, Field(max_length=URL_LENGTH), AfterValidator(_check_storable), AfterValidator(_check_s3_url)]
SourceUrl = Annotated[str, Field(max_length=URL_LENGTH), AfterValidator(_check_url)]
Filename = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_check_storable)]
ContentType = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.+-]+/[a-zA-Z0-9_.+-]+$", max_length=255)]
PartNumber = Annotated[int, Field(ge=1, le=MOST_PARTS, strict=True)]
Priority = Annotated[int, Field(ge=-100, le=100, strict=True)]
Events = Annotated[
    tuple[EventName, ...],
    Field(min_length=1, max_length=20, description="What to be told of; null is everything, types to come included."),
]
Description = Annotated[str, Field(max_length=NAME_LENGTH), AfterValidator(_check_storable)]


class JobSettings(Request):
    """What a submission says besides its source."""

    mode: ModeName
    options: Options = Options()
    webhook_url: WebhookUrl | None = None
    metadata: Metadata = Field(default_factory=dict)
    priority: Priority = 0
    expect: JobKind | None = Field(
        default=None, description="What a source must be; one that is not makes no job, or one that fails at once."
    )


class NewSource(Request):
    """Exactly one of these. What is not an upload is fetched first, by a worker."""

    upload_id: uuid.UUID | None = None
    s3: Annotated[S3Url | None, Field(description="`s3://bucket/key`, of the buckets that the service reads.")] = None
    url: Annotated[SourceUrl | None, Field(description="`https://…`")] = None

    @model_validator(mode="after")
    def _be_one(self) -> Self:
        if len(self.model_fields_set) != 1 or all(each is None for each in (self.upload_id, self.s3, self.url)):
            raise ValueError("needs exactly one of upload_id, s3 and url")
        if self.s3 is not None and not Place.parse(self.s3).key:
            raise ValueError("s3 needs a key behind the bucket")
        return self


class NewJob(JobSettings):
    source: NewSource


class JobPage(BaseModel):
    items: list[Job]
    next_cursor: str | None


class NewBatchItem(Request):
    """What becomes one job; its metadata is the job's."""

    source: NewSource
    metadata: Metadata = Field(default_factory=dict)


class NewBatch(JobSettings):
    """Everything but the items' own is said once, for all jobs; `webhook_url` is told of the batch's end alone."""

    name: Annotated[str, Field(min_length=1, max_length=NAME_LENGTH), AfterValidator(_check_storable)]
    priority: Priority = BATCH_PRIORITY
    items: Annotated[list[NewBatchItem] | None, Field(min_length=1, max_length=BATCH_ITEMS)] = None
    prefix: Annotated[
        S3Url | None, Field(description="`s3://bucket/prefix`: every object whose key begins so becomes an item.")
    ] = None

    @model_validator(mode="after")
    def _have_items(self) -> Self:
        if (self.items is None) == (self.prefix is None):
            raise ValueError("needs either items or a prefix")
        return self


class BatchPage(BaseModel):
    items: list[Batch]
    next_cursor: str | None


class NewUpload(Request):
    filename: Filename
    size: Annotated[int, Field(gt=0, strict=True)]
    content_type: ContentType = "application/octet-stream"


class WantedParts(Request):
    numbers: Annotated[tuple[PartNumber, ...], Field(min_length=1, max_length=PARTS_AT_ONCE)]


class PartLink(BaseModel):
    number: int
    size: int
    """How many bytes to PUT, exactly."""
    url: str


class PartLinks(BaseModel):
    parts: list[PartLink]
    links_expire_in_seconds: int


class CompletedPart(Request):
    number: PartNumber
    etag: Annotated[str, Field(max_length=255), AfterValidator(_check_storable)]


class CompletedUpload(Request):
    parts: Annotated[tuple[CompletedPart, ...], Field(max_length=MOST_PARTS)] = ()
    """None: what has arrived."""


class ArrivedPart(BaseModel):
    number: int
    size: int
    etag: str


class Upload(BaseModel):
    id: uuid.UUID
    filename: str
    content_type: str
    size: int
    completed: bool
    url: str | None
    """Where to PUT the bytes, with exactly these `headers`; None once completed, and for an upload in parts."""
    headers: dict[str, str]
    part_size: int | None
    """The size of every part but the last, which has the rest; None for an upload of one PUT."""
    part_count: int | None
    parts: list[ArrivedPart]
    """Those that have arrived, so that the others can be sent; empty once completed."""
    created_at: datetime
    expires_at: datetime


class NewEndpoint(Request):
    url: WebhookUrl
    events: Events | None = None
    description: Description | None = None


class EndpointChange(Request):
    """What is left out stays as it is."""

    url: WebhookUrl | None = None
    events: Events | None = None
    description: Description | None = None
    disabled: Annotated[bool, Field(strict=True)] | None = Field(
        default=None, description="false enables it again, whatever disabled it."
    )

    @model_validator(mode="after")
    def _mean_something(self) -> Self:
        if any(name in self.model_fields_set and getattr(self, name) is None for name in ("url", "disabled")):
            raise ValueError("url and disabled may be left out, but not null")
        return self


class Endpoint(BaseModel):
    id: uuid.UUID
    url: str
    description: str | None
    events: list[str] | None
    secret_hint: str
    """How its secret begins, to tell which one a receiver has."""
    old_secret_until: datetime | None
    """While a secret that was replaced signs along."""
    disabled: bool
    disabled_at: datetime | None
    disabled_reason: Literal["asked", "gone", "failing"] | None
    failing_since: datetime | None
    """The first failure that no success has followed."""
    paused_until: datetime | None
    """What it asked for by Retry-After."""
    created_at: datetime


class EndpointWithSecret(Endpoint):
    secret: str
    """It is not shown again."""


class DeliveryAttempt(BaseModel):
    number: int
    ended_at: datetime
    status: int | None
    error: str | None
    """Why there is no status."""
    latency_seconds: float
    reply: str | None
    """The first kilobyte of what the receiver answered."""


class Delivery(BaseModel):
    id: uuid.UUID
    webhook_id: str
    """The header by which the receiver knows it, the same however often it is sent."""
    type: str
    endpoint_id: uuid.UUID | None
    """None of a job's or a batch's own webhook_url."""
    job_id: uuid.UUID | None
    state: DeliveryState
    created_at: datetime
    finished_at: datetime | None
    next_attempt_at: datetime | None
    attempts: list[DeliveryAttempt]
    """The newest, in their order."""


class DeliveryPage(BaseModel):
    items: list[Delivery]
    next_cursor: str | None


class ModeClass(BaseModel):
    id: int
    name: str
    color: str


class ModeDescription(BaseModel):
    name: str
    model: str
    label_space: str
    classes: list[ModeClass]
    input_size: int
    licence: str
    commercial_use: bool | None
    quality: dict[str, str | float]
    """As published by its authors, on their benchmark; not our measurement."""
    help: str
    served: bool
    """Whether a live worker runs it now."""


class WorkerDescription(BaseModel):
    id: uuid.UUID
    host: str
    queue: str
    device: str
    memory_bytes: int
    modes: list[str]
    mode_loaded: str | None
    busy: bool
    started_at: datetime
    heartbeat_at: datetime
