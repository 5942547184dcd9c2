"""Cutting a recording into chunks: half-open ranges of presentation timestamps that can be read on their own."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.inference.recording import Index


@dataclass(frozen=True)
class Chunk:
    """The frames from `start` up to but without `end`, in ticks of the recording's time base; None is unbounded.

    `first` is the number of its first frame in the recording, `frames` how many it has, and `keyframe` the time of
    the keyframe that decoding begins at: `start` itself, an earlier one, or None for the beginning of the file.
    """

    ordinal: int
    first: int
    frames: int
    start: int
    end: int | None
    keyframe: int | None


def plan_chunks(index: Index, *, frames: int, exact: bool = False) -> list[Chunk]:
    """Chunks that together hold every frame once, in order; each of about `frames` frames, beginning at a keyframe.

    Where keyframes are further apart, a chunk begins between them, and is at least as long as what must be decoded
    before it: a recording with a single keyframe is decoded twice at most, not once per chunk. `exact` makes chunks of
    `frames` frames wherever they fall. Raises ValueError for fewer than one frame.
    """
    if frames < 1:
        raise ValueError("a chunk has at least one frame")
    total = len(index.times)
    firsts = list(range(0, total, frames)) if exact else _choose_firsts(index, frames)
    bounds = [*firsts, total]
    return [
        _make_chunk(index, ordinal, first, end)
        for ordinal, (first, end) in enumerate(zip(firsts, bounds[1:], strict=True))
    ]


def begin_earlier(index: Index, chunk: Chunk, first: int) -> Chunk:
    """The chunk with the frames from number `first` on before it: to look back at, not to make.

    Raises ValueError unless `first` is from 0 to the chunk's own first.
    """
    if not 0 <= first <= chunk.first:
        raise ValueError(f"frame {first} is not one up to the chunk's first, {chunk.first}")
    return _make_chunk(index, chunk.ordinal, first, chunk.first + chunk.frames)


def _make_chunk(index: Index, ordinal: int, first: int, end: int) -> Chunk:
    keyframe = index.keyframe_before(np.arange(first, end)).min()
    return Chunk(
        ordinal,
        first,
        end - first,
        int(index.times[first]),
        int(index.times[end]) if end < len(index.times) else None,
        int(index.keyframes.pts[keyframe]) if keyframe >= 0 else None,
    )


def _choose_firsts(index: Index, frames: int) -> list[int]:
    total = len(index.times)
    starts = np.append(np.flatnonzero(np.isin(index.packets, index.keyframes.number)), total)  # the end is as good
    firsts = [0]
    while True:
        first = firsts[-1]
        # Within half a chunk to either side, so that no chunk gets tiny or more than half longer than asked for.
        low = np.searchsorted(starts, first + max(1, (frames + 1) // 2))
        near = starts[low : np.searchsorted(starts, first + frames + frames // 2, side="right")]
        if len(near):
            following = int(near[np.abs(near - (first + frames)).argmin()])
        else:
            following = first + max(frames, first - _last_up_to(starts, first))
            # A keyframe on the way is a better place to begin.
            reached = int(np.searchsorted(starts, first + frames))
            if reached < len(starts):
                following = min(following, int(starts[reached]))
        if following >= total:
            return firsts
        firsts.append(following)


def _last_up_to(starts: NDArray[np.int64], position: int) -> int:
    """The last of the ascending `starts` that is not after `position`; 0 before the first."""
    count = int(np.searchsorted(starts, position, side="right"))
    return int(starts[count - 1]) if count else 0
