"""The bundle of a recording: what its chunks made, joined without encoding anything again, and the manifest."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.contract import Options
from shared.errors import TooManyBadFrames
from shared.inference import mask_video
from shared.inference.labels import describe_classes
from shared.inference.modes import MODES
from shared.inference.overlay_video import join_overlays
from shared.inference.recording import Index
from shared.lifecycle import ClaimedStep
from shared.models import Job, Step, StepKind
from worker.desk import Desk
from worker.manifest import Result, prefix_of, store, store_manifest
from worker.outputs import AREAS, CONFIDENCE, CONTENT_TYPES, MASKS, OVERLAY
from worker.pipeline import ahead
from worker.probe import describe, read_index
from worker.selection import select_frames
from worker.tables import FrameRow, FramesWriter, join_areas

FETCHED_AHEAD = 2  # files of chunks
AREAS_LINES, FRAMES, CLASSES = "areas.jsonl", "frames.parquet", "classes.json"


@dataclass(frozen=True, kw_only=True)
class DoneChunk:
    """A chunk as its step left it: the plan it was made by, and what came of it."""

    plan: dict[str, Any]
    result: dict[str, Any]

    def find(self, name: str) -> dict[str, Any] | None:
        return next((file for file in self.result["files"] if file["name"] == name), None)


def read_chunks(session: Session, job: Job) -> list[DoneChunk]:
    """All chunks of a recording, in order."""
    wanted = select(Step.plan, Step.result).where(Step.job_id == job.id, Step.kind == StepKind.INFER)
    rows = session.execute(wanted.order_by(Step.ordinal))
    return [DoneChunk(plan=plan, result=result) for plan, result in rows]


def join_chunks(claimed: ClaimedStep, desk: Desk, chunks: Sequence[DoneChunk]) -> Result:
    """Make and store everything but the publication. Raises what storage and media raise, and TooManyBadFrames."""
    job, options = claimed.job, Options.model_validate(claimed.job.options)
    index = read_index(desk, job)
    selected = select_frames(index.times, index.header.time_base, options.frames)
    count = int(selected.sum())
    bad = [number for chunk in chunks for number in chunk.result["bad"]]
    if len(bad) > options.max_bad_frames * count:
        raise TooManyBadFrames(
            f"{len(bad)} of {count} frames are damaged, and max_bad_frames takes {options.max_bad_frames:g}"
        )
    stored: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="maskline-bundle-") as name:
        folder = Path(name)

        def keep(path: Path, content_type: str) -> None:
            stored.append(store(desk, prefix_of(claimed), path.name, path, content_type=content_type))
            path.unlink()

        for output, join in ((MASKS, mask_video.join), (CONFIDENCE, mask_video.join), (OVERLAY, join_overlays)):
            if any(chunk.find(output) for chunk in chunks):
                with _open_parts(desk, chunks, output, folder) as parts:
                    join(parts, folder / output)
                keep(folder / output, CONTENT_TYPES[output])
        with _open_parts(desk, chunks, AREAS, folder) as parts:
            join_areas(parts, folder / AREAS, folder / AREAS_LINES)
        keep(folder / AREAS, CONTENT_TYPES[AREAS])
        keep(folder / AREAS_LINES, "application/x-ndjson")
        _write_frames(folder / FRAMES, index, chunks, selected, frozenset(bad))
        keep(folder / FRAMES, CONTENT_TYPES[AREAS])
        classes = json.dumps(describe_classes(MODES[job.mode].labels), indent=1).encode()
        stored.append(store(desk, prefix_of(claimed), CLASSES, classes, content_type="application/json"))
    areas: Counter[int] = Counter()
    for chunk in chunks:
        areas.update({int(number): pixels for number, pixels in chunk.result["areas"].items()})
    warnings = dict.fromkeys([*index.header.warnings, *(each for chunk in chunks for each in chunk.result["warnings"])])
    return store_manifest(
        claimed, desk, model=job.model, timing=_add_up(chunks, frames=count),
        source=describe(index.header), areas=areas, warnings=list(warnings), files=stored,
        frames={"source": len(selected), "processed": count, "bad": bad}, chunks=len(chunks),
    )  # fmt: skip


def _write_frames(
    path: Path, index: Index, chunks: Sequence[DoneChunk], processed: NDArray[np.bool_], bad: Set[int]
) -> None:
    """A row per frame of the source; those between chunks of which nothing was processed belong to the one before."""
    firsts = np.array([chunk.plan["first"] for chunk in chunks])
    numbers = np.maximum(0, np.searchsorted(firsts, np.arange(len(index.times)), side="right") - 1)
    with FramesWriter(path, index.header.time_base) as writer:
        for frame, pts in enumerate(index.times.tolist()):
            writer.write(FrameRow(frame, pts, int(numbers[frame]), bool(processed[frame]), frame in bad))


@contextmanager
def _open_parts(desk: Desk, chunks: Sequence[DoneChunk], name: str, folder: Path) -> Iterator[Iterator[Path]]:
    """The chunks' files of one name, in order and each for its turn; few enough are on the disk at a time."""
    with ahead(_fetch_parts(desk, chunks, name, folder), depth=FETCHED_AHEAD) as parts:
        yield _use_up(parts)


def _fetch_parts(desk: Desk, chunks: Sequence[DoneChunk], name: str, folder: Path) -> Iterator[Path]:
    for number, chunk in enumerate(chunks):
        desk.checkpoint()
        file = chunk.find(name)
        if file is not None:
            part = folder / f"{number}-{name}"
            desk.storage.download(file["key"], part, size_bytes=file["size"])
            yield part


def _use_up(parts: Iterator[Path]) -> Iterator[Path]:
    for part in parts:
        yield part
        part.unlink()


def _add_up(chunks: Sequence[DoneChunk], *, frames: int) -> dict[str, Any]:
    """The seconds of all chunks, which may have passed at the same time on several workers."""
    timings = [chunk.result["timing"] for chunk in chunks]
    seconds = {name for timing in timings for name in timing if name.endswith("_seconds")}
    return {
        **{name: round(sum(timing.get(name, 0) for timing in timings), 6) for name in sorted(seconds)},
        "frames": frames,
        "peak_gpu_bytes": max(timing["peak_gpu_bytes"] for timing in timings),
        "device": next((timing["device"] for timing in timings if timing["device"]), None),
    }
