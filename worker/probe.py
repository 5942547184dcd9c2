"""The probe of a recording: what it holds, which of its frames are processed, and the chunks they are made in."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from sqlalchemy import Float, cast, func, select
from sqlalchemy.orm import Session

from shared.contract import Options
from shared.inference.chunks import plan_chunks
from shared.inference.errors import InvalidMedia
from shared.inference.probe import probe
from shared.inference.recording import Header, Index, Limits
from shared.lifecycle import ClaimedStep
from shared.models import Job, JobState
from worker.desk import Desk
from worker.manifest import prefix_of
from worker.selection import select_frames

LATELY = 20  # jobs of a mode whose speed tells how long a frame takes
SECONDS_PER_FRAME = 0.5  # before any job of a mode was done
INDEX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`recording` is JSON, as the job keeps it; `chunks` are its steps' plans, and `frames` are processed in all."""

    recording: dict[str, Any]
    chunks: Sequence[dict[str, Any]]
    frames: int


def make_plan(claimed: ClaimedStep, desk: Desk, *, seconds_per_frame: float) -> Plan:
    """Read the recording's packets, store their index, and plan chunks of about `chunk_seconds` of work each.

    Raises what storage and media raise, and InvalidMedia when none of the frames was asked for.
    """
    job, settings = claimed.job, desk.settings
    options = Options.model_validate(job.options)
    desk.tell("probing")
    limits = Limits(
        max_pixels=settings.worker.image_pixels, max_frames=settings.recordings.frames,
        max_seconds=settings.recordings.duration_seconds,
    )  # fmt: skip
    with open_source(desk, job) as source:
        index = probe(source, limits=limits)
    selected = select_frames(index.times, index.header.time_base, options.frames)
    count = int(selected.sum())
    if count == 0:
        raise InvalidMedia("None of the recording's frames lies in the span that was asked for")
    target = max(1, round(settings.recordings.chunk_seconds / seconds_per_frame * len(selected) / count))
    chunks = [
        asdict(chunk)
        for chunk in plan_chunks(index, frames=target)
        if selected[chunk.first : chunk.first + chunk.frames].any()
    ]
    key = f"{prefix_of(claimed)}index.npz"
    desk.checkpoint()
    desk.storage.put(key, index.to_bytes(), content_type="application/octet-stream")
    return Plan(recording={"index_key": key, **describe(index.header)}, chunks=chunks, frames=count)


def describe(header: Header) -> dict[str, Any]:
    """What is told of a recording, as JSON."""
    width, height = header.upright_size
    return {
        "width": width, "height": height, "container": header.format, "codec": header.codec,
        "pixel_format": header.pixel_format, "time_base": str(header.time_base), "duration_seconds": header.seconds,
        "sample_aspect_ratio": str(header.sample_aspect_ratio), "warnings": list(header.warnings),
    }  # fmt: skip


def open_source(desk: Desk, job: Job) -> BinaryIO:
    """The recording in the storage, to be read in parts; use it as a context manager."""
    source = job.source
    return desk.storage_of(job).open(source["key"], etag=source["etag"], size_bytes=source["size_bytes"])


def read_index(desk: Desk, job: Job) -> Index:
    """The index that the probe has stored."""
    found = job.recording or {}
    return Index.from_bytes(desk.storage.read(found["index_key"], limit_bytes=INDEX_BYTES))


def estimate_seconds_per_frame(session: Session, mode: str) -> float:
    """What a frame took the model, on average over the mode's newest jobs that are done."""
    lately = (
        select(Job.timing)
        .where(Job.mode == mode, Job.state == JobState.SUCCEEDED)
        .order_by(Job.id.desc())  # by age, along the primary key
        .limit(LATELY)
        .subquery()
    )

    def total(name: str) -> Any:
        return func.sum(cast(lately.c.timing[name].astext, Float))

    stages = sum((func.coalesce(total(f"{stage}_seconds"), 0) for stage in ("inference", "postprocess")), start=0)
    found = session.scalar(select(stages / func.nullif(total("frames"), 0)))
    return float(found) if found else SECONDS_PER_FRAME
