"""The wire contract: what clients send and receive, in REST answers, events, manifests and webhooks alike."""

import uuid
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared import models
from shared.inference.recipe import MAX_OVERLAP, Recipe, Resize

ModeName = Literal["fast", "balanced", "accurate", "sota", "demo"]
OutputName = Literal["mask", "overlay", "confidence"]
JobKind = Literal["image", "recording"]

SMOOTH_WINDOW = 5
"""Of the windows from 3 to 15, the shortest that removes nearly all the flicker that any does (bench/smooth.py)."""


class Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Frames(Wire, frozen=True):
    """Which frames of a recording are processed: of those in the span every n-th, or those nearest to a steady rate."""

    every: Annotated[int, Field(ge=1, strict=True)] | None = None
    fps: Annotated[float, Field(gt=0, le=1000)] | None = Field(default=None, description="Frames per second.")
    from_seconds: Annotated[float, Field(ge=0)] = Field(default=0.0, description="After the recording's first frame.")
    to_seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.every is not None and self.fps is not None:
            raise ValueError("every and fps both say how many frames: leave one out")
        if self.to_seconds is not None and self.to_seconds <= self.from_seconds:
            raise ValueError("to_seconds does not come after from_seconds")
        return self


class Options(Wire, frozen=True):
    """How a job's masks are made; what is left out takes the mode's default."""

    input_size: Annotated[int, Field(ge=32, le=4096, strict=True)] | None = Field(
        default=None, description="Side of the square with as many pixels as the model is given."
    )
    resize: Resize = Field(
        default="fit",
        description='"published" resizes as the model\'s published evaluation did; input_size is then left out.',
    )
    tta: bool = Field(
        default=False, description="The published multi-scale protocol: six sizes, each also mirrored, averaged."
    )
    tiles: bool = Field(
        default=False, description="Show the image at its own resolution, in tiles of input_size that overlap."
    )
    tile_overlap: Annotated[float, Field(ge=0, le=MAX_OVERLAP)] = Field(
        default=0.25, description="The part of a tile's side that it shares with its neighbour."
    )
    unlabeled_below: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Pixels whose confidence is less get id 0."
    )
    outputs: Annotated[tuple[OutputName, ...], Field(min_length=1)] = ("mask",)
    frames: Frames = Field(default=Frames(), description="Of a recording; all of them unless said otherwise.")
    max_bad_frames: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.05,
        description="The part of a recording's frames that may be damaged: their masks are 0. More fail the job.",
    )
    smooth: Annotated[bool, Field(strict=True)] | Annotated[int, Field(ge=3, le=15, strict=True)] = Field(
        default=False,
        description="Against flicker in a recording: a pixel shows the newest label that two processed frames in a row "
        f"gave among so many; true stands for {SMOOTH_WINDOW}. Changes come one frame late. Confidence stays that of "
        "the frame alone. Each chunk segments so many frames, less one, twice.",
    )

    @field_validator("smooth")
    @classmethod
    def _tell_the_window(cls, smooth: bool | int) -> bool | int:
        # Kept with the job as a number, so that all chunks have the same one even if the default changes between them.
        return SMOOTH_WINDOW if smooth is True else smooth

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        self.recipe()
        return self

    @property
    def smooth_window(self) -> int:
        """How many frames a mask is made from."""
        return int(self.smooth) or 1

    def recipe(self) -> Recipe:
        """What the inference core is told."""
        return Recipe(
            input_size=self.input_size,
            resize=self.resize,
            tta=self.tta,
            tiles=self.tiles,
            tile_overlap=self.tile_overlap,
            confidence="confidence" in self.outputs,
            unlabeled_below=self.unlabeled_below,
        )


class Progress(Wire):
    stage: str | None
    done: int
    total: int | None
    unit: Literal["frames"] = "frames"
    frames_per_second: float | None
    eta_seconds: float | None


class Timing(Wire):
    """Seconds per stage as the worker measured them; `queued` and `total` by the database's clock."""

    queued_seconds: float | None = None
    load_seconds: float | None = None
    download_seconds: float | None = None
    decode_seconds: float | None = None
    preprocess_seconds: float | None = None
    inference_seconds: float | None = None
    postprocess_seconds: float | None = None
    encode_seconds: float | None = None
    upload_seconds: float | None = None
    total_seconds: float | None = None
    frames: int | None = None
    peak_gpu_bytes: int | None = None
    device: str | None = None


class Model(Wire):
    name: str
    revision: str
    dtype: str
    input_size: tuple[int, int]
    """Width and height given to the model."""


class Failure(Wire):
    code: str
    detail: str
    retryable: bool


class Links(Wire):
    self: str
    events: str
    result: str
    cancel: str
    retry: str


class Source(Wire):
    filename: str
    size_bytes: int | None = Field(description="null until a source that has to be fetched was.")
    location: str | None = Field(
        description="Where it was fetched from, a URL without its query; null for a file that was sent or uploaded."
    )
    expires_at: datetime | None = Field(
        description="When the service removes its copy, after which the job cannot be retried; null until the job has "
        "ended, and for a source that is read where it lies."
    )


class Job(Wire):
    id: uuid.UUID
    state: models.JobState
    mode: str
    kind: JobKind | None = Field(description="null until a source that has to be fetched was.")
    source: Source
    options: Options
    metadata: dict[str, Any]
    priority: int
    batch_id: uuid.UUID | None
    attempts: int
    progress: Progress
    queue_position: int | None
    cancel_requested_at: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None = Field(description="When the job goes with its result; null until it has ended.")
    timing: Timing
    model: Model | None
    error: Failure | None
    links: Links


class BatchJobs(Wire):
    """How many jobs of the batch there are, and how many in each state."""

    total: int = 0
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    canceled: int = 0
    expired: int = 0


class BatchProgress(Wire):
    done: int = 0
    total: int | None = Field(
        default=0, description="Of all jobs; null while the length of a recording among those that go on is not known."
    )
    unit: Literal["frames"] = "frames"
    frames_per_second: float | None = Field(
        default=None,
        description="Frames done by the jobs that started since the batch was created or last reopened, divided by the "
        "seconds from the first of these starts until now, or until the batch was completed.",
    )
    eta_seconds: float | None = Field(
        default=None, description="The frames that jobs which have not ended still have to do, by frames_per_second."
    )


class BatchLinks(Wire):
    self: str
    jobs: str
    cancel: str
    retry_failed: str


class Batch(Wire):
    """`jobs` and `progress` are of this moment while the batch runs, and of its end once it is completed."""

    id: uuid.UUID
    name: str
    state: Literal["running", "completed"]
    mode: str
    options: Options
    metadata: dict[str, Any]
    priority: int
    jobs: BatchJobs
    progress: BatchProgress
    created_at: datetime
    finished_at: datetime | None
    links: BatchLinks


def describe_batch(row: models.Batch, totals: dict[str, Any]) -> Batch:
    """The batch as every client sees it; `totals` are the ones of `shared/tally.py`."""
    path = f"/v1/batches/{row.id}"
    return Batch.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "state": "running" if row.finished_at is None else "completed",
            "mode": row.mode,
            "options": row.options,
            "metadata": row.details,
            "priority": row.priority,
            **totals,
            "created_at": row.created_at,
            "finished_at": row.finished_at,
            "links": BatchLinks(
                self=path,
                jobs=f"/v1/jobs?batch_id={row.id}",
                cancel=f"{path}/cancel",
                retry_failed=f"{path}/retry-failed",
            ),
        }
    )


def describe_job(row: models.Job, *, queue_position: int | None = None) -> Job:
    """The job as every client sees it, whichever way it is told."""
    path = f"/v1/jobs/{row.id}"
    return Job.model_validate(
        {
            "id": row.id,
            "state": row.state,
            "mode": row.mode,
            "kind": row.kind,
            "source": {
                **{name: row.source.get(name) for name in ("filename", "size_bytes", "location")},
                "expires_at": row.source_expires_at,
            },
            "options": row.options,
            "metadata": row.details,
            "priority": row.priority,
            "batch_id": row.batch_id,
            "attempts": row.attempts,
            "progress": _describe_progress(row),
            "queue_position": queue_position,
            "cancel_requested_at": row.cancel_requested_at,
            "created_at": row.created_at,
            "started_at": row.started_at,
            "finished_at": row.finished_at,
            "expires_at": row.expires_at,
            "timing": {
                **(row.timing or {}),
                "queued_seconds": _seconds_between(row.queued_at, row.started_at),
                "total_seconds": _seconds_between(row.queued_at, row.finished_at),
            },
            "model": row.model,
            "error": row.error,
            "links": Links(
                self=path,
                events=f"{path}/events",
                result=f"{path}/result",
                cancel=f"{path}/cancel",
                retry=f"{path}/retry",
            ),
        }
    )


def _describe_progress(row: models.Job) -> Progress:
    elapsed = _seconds_between(row.started_at, row.finished_at or row.progress_at)
    speed = row.frames_done / elapsed if elapsed and row.frames_done else None
    left = row.frames_total - row.frames_done if row.frames_total is not None else None
    return Progress(
        stage=row.stage,
        done=row.frames_done,
        total=row.frames_total,
        frames_per_second=speed,
        eta_seconds=left / speed if left is not None and speed and row.finished_at is None else None,
    )


def _seconds_between(start: datetime | None, end: datetime | None) -> float | None:
    if start is None or end is None:
        return None
    return round((end - start) / timedelta(seconds=1), 6)
