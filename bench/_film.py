"""A recording to measure with: landscapes that move, its jobs queued in chunks of a length, and joined."""

import io
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from bench._service import MODE, Service
from shared.broker import IO
from shared.config import Recordings
from shared.contract import Options
from shared.inference.chunks import plan_chunks
from shared.inference.demo.scenes import draw_scene
from shared.inference.frames import read_frames
from shared.inference.probe import probe
from shared.inference.recording import Limits
from shared.models import Job, JobState, Step, StepKind, create_id
from shared.storage import upload_key
from worker.probe import estimate_seconds_per_frame

RATE = 25
SEED = 3
SCENES = 25
"""As many are drawn and shown forth and back, as drawing one takes longer than all that is measured of a frame."""
WHOLE = 2
"""A chunk ends at the keyframe nearest to the length asked for, so it takes more than all to have all in one."""


@dataclass(frozen=True, kw_only=True)
class Film:
    """A stored recording: `source` as jobs describe it, its bytes, and how many frames it has."""

    source: dict[str, Any]
    content: bytes
    frames: int

    def decode(self) -> list[NDArray[np.uint8]]:
        """All its frames, as the model is given them."""
        limits = Limits(max_pixels=2**26, max_frames=2**20, max_seconds=2**20)
        index = probe(io.BytesIO(self.content), limits=limits)
        [chunk] = plan_chunks(index, frames=WHOLE * self.frames)
        frames = read_frames(io.BytesIO(self.content), index, chunk)
        return [frame.image for frame in frames if frame.image is not None]


def store_film(service: Service, *, frames: int, size: tuple[int, int], keyframe_every: int = RATE) -> Film:
    content = _encode(frames, size, keyframe_every)
    key = upload_key(service.tenant_id, create_id())
    stored = service.storage.put(key, content, content_type="video/mp4")
    source = {"key": key, "etag": stored.etag, "size_bytes": stored.size_bytes, "filename": "film.mp4"}
    return Film(source=source, content=content, frames=frames)


def queue_chunks(
    service: Service, film: Film, *, frames: int | None = None, options: Options | None = None
) -> uuid.UUID:
    """Submit a job and have it probed; its chunks, of so many frames each or one of all, are queued."""
    with service.sessions() as session:
        expected = estimate_seconds_per_frame(session, MODE) * (frames or WHOLE * film.frames)
    settings = service.settings.model_copy(update={"recordings": Recordings(chunk_seconds=expected)})
    job_id = service.submit((StepKind.PROBE, IO), kind="recording", source=film.source, options=options)
    with replace(service, settings=settings).runner(IO) as runner:
        runner.run_until_idle()
    planned = [chunk.plan["frames"] for chunk in read_chunks(service, job_id) if chunk.plan]
    assert sum(planned) == film.frames, "not every frame is in a chunk"
    assert set(planned[:-1]) <= {frames}, f"the chunks have {planned} frames"
    return job_id


def read_chunks(service: Service, job_id: uuid.UUID) -> list[Step]:
    wanted = select(Step).where(Step.job_id == job_id, Step.kind == StepKind.INFER).order_by(Step.ordinal)
    with service.sessions() as session:
        return list(session.scalars(wanted))


def publish(service: Service, job_id: uuid.UUID) -> None:
    """Join the chunks, which are all done."""
    with service.runner(IO) as runner:
        runner.run_until_idle()
    with service.sessions() as session:
        job = session.get_one(Job, job_id)
    assert job.state == JobState.SUCCEEDED, f"a recording has {job.state}: {job.error}"


def _encode(frames: int, size: tuple[int, int], keyframe_every: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=RATE, width=size[0], height=size[1], pix_fmt="yuv420p")
        stream.codec_context.gop_size = keyframe_every
        stream.codec_context.options = {"sc_threshold": "0"}
        for number, picture in enumerate(islice(_show_scenes(size), frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def _show_scenes(size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    drawn = [
        draw_scene(SEED, width=size[0], height=size[1], time_seconds=number / RATE).image for number in range(SCENES)
    ]
    while True:
        yield from drawn
        yield from drawn[::-1]
