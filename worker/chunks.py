"""A chunk of a recording: its frames decoded, segmented and written, all three at once, then stored.

The model never waits for a file if the others keep up, and neither of them is ever more than a few frames away from
it, so memory is the same for a chunk of a second and of an hour.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.contract import Options
from shared.inference.chunks import Chunk, begin_earlier
from shared.inference.frames import Frame, read_frames
from shared.lifecycle import ClaimedStep
from worker.desk import Desk, timed
from worker.manifest import describe_model, prefix_of, store
from worker.outputs import Outputs, open_outputs
from worker.pipeline import ahead, behind
from worker.probe import open_source, read_index
from worker.selection import find_earlier, select_frames

if TYPE_CHECKING:
    from shared.inference.engine import Segmentation
    from shared.inference.recipe import Recipe

TELL_SECONDS = 2.0
STAGES = ("load", "preprocess", "inference", "postprocess")


class BatchSegmenter(Protocol):
    """The engine."""

    batch_images: int

    def segment_batch(
        self, images: Sequence[NDArray[np.uint8]], mode: str, recipe: "Recipe", *, checkpoint: Callable[[], None]
    ) -> "Sequence[Segmentation]": ...


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """What is written down of a chunk that is done; `result` is JSON, for the step that joins them."""

    result: dict[str, Any]
    model: dict[str, Any] | None
    frames: int


@dataclass
class _Tally:
    """What adds up over the frames of a chunk. Those before its `first` take time, and are counted elsewhere."""

    first: int
    frames: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak_gpu_bytes: int = 0
    device: str | None = None
    model: dict[str, Any] | None = None
    warnings: dict[str, None] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)

    def add(self, made: "Segmentation") -> None:
        for stage in STAGES:
            self.seconds[stage] += getattr(made, f"{stage}_seconds")
        self.peak_gpu_bytes = max(self.peak_gpu_bytes, made.peak_gpu_bytes)
        self.device, self.model = made.model.device, describe_model(made)
        self.warnings |= dict.fromkeys(made.warnings)


def make_chunk(claimed: ClaimedStep, desk: Desk, engine: BatchSegmenter) -> ChunkResult:
    """Make and store everything of one chunk. Raises what storage, media and engine raise."""
    job, options = claimed.job, Options.model_validate(claimed.job.options)
    chunk = Chunk(**claimed.plan or {})
    tally = _Tally(chunk.first)
    index = read_index(desk, job)
    selected = select_frames(index.times, index.header.time_base, options.frames)
    reach = begin_earlier(index, chunk, find_earlier(selected, chunk.first, options.smooth_window - 1))
    span = slice(reach.first, reach.first + reach.frames)
    wanted = index.times[span][selected[span]]
    with tempfile.TemporaryDirectory(prefix="maskline-chunk-") as folder:
        with (
            open_source(desk, job) as source,
            open_outputs(Path(folder), job.mode, options, index.header, first=chunk.first) as outputs,
        ):
            frames = read_frames(source, index, reach, wanted=wanted.tolist())
            _segment(_time_decoding(frames, tally), outputs, job.mode, options, desk, engine, tally)
        with timed(tally.seconds, "upload"):
            stored = [
                store(desk, prefix_of(claimed), path.name, path, content_type=content_type)
                for path, content_type in outputs.files
            ]
    timing = {f"{stage}_seconds": round(seconds, 6) for stage, seconds in sorted(tally.seconds.items())}
    result = {
        "files": stored, "bad": tally.bad, "areas": {str(number): pixels for number, pixels in outputs.areas.items()},
        "warnings": list(tally.warnings), "model": tally.model,
        "timing": {**timing, "peak_gpu_bytes": tally.peak_gpu_bytes, "device": tally.device},
    }  # fmt: skip
    return ChunkResult(result=result, model=tally.model, frames=tally.frames)


def _segment(
    frames: Iterator[Frame],
    outputs: Outputs,
    mode: str,
    options: Options,
    desk: Desk,
    engine: BatchSegmenter,
    tally: _Tally,
) -> None:
    """Put every frame through the model and hand it on to `outputs`, in order."""
    recipe = options.recipe()
    told_at: float | None = None

    def write(pair: "tuple[Frame, Segmentation | None]") -> None:
        with timed(tally.seconds, "encode"):
            outputs.write(*pair)

    depth = 2 * engine.batch_images
    with ahead(frames, depth=depth) as decoded, behind(write, depth=depth) as hand_on:
        while batch := list(islice(decoded, engine.batch_images)):
            desk.checkpoint()
            if told_at is None or time.monotonic() - told_at > TELL_SECONDS:
                desk.tell("segmenting", tally.frames)
                told_at = time.monotonic()
            images = [frame.image for frame in batch if frame.image is not None]
            made = iter(engine.segment_batch(images, mode, recipe, checkpoint=desk.checkpoint) if images else ())
            for frame in batch:
                segmentation = None if frame.image is None else next(made)
                if segmentation is not None:
                    tally.add(segmentation)
                elif frame.number >= tally.first:
                    tally.bad.append(frame.number)
                hand_on((frame, segmentation))
            tally.frames += sum(frame.number >= tally.first for frame in batch)


def _time_decoding(frames: Iterator[Frame], tally: _Tally) -> Iterator[Frame]:
    while True:
        with timed(tally.seconds, "decode"):
            frame = next(frames, None)
        if frame is None:
            return
        yield frame
