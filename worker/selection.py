"""Which frames of a recording are processed."""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shared.contract import Frames

RATE_DENOMINATOR = 10_000
"""Takes 23.976 and 29.97 as they are written, and the exact 24000/1001 and 30000/1001 too."""


def select_frames(pts: NDArray[np.int64], time_base: Fraction, wanted: Frames) -> NDArray[np.bool_]:
    """Which of the frames at `pts`, int64 (frames) ascending and counting in `time_base` seconds, are processed.

    Seconds count from the first frame. `fps` takes the frames that are on the screen at from, from + 1 / fps and so
    on; asked for more than there are, it takes each once. Numbers are taken as they are written: 0.1 is a tenth.
    """
    ticks = pts - pts[:1]
    start = _first_tick(wanted.from_seconds, time_base)
    selected = ticks >= start
    if wanted.to_seconds is not None:
        selected &= ticks < _first_tick(wanted.to_seconds, time_base)
    if wanted.every is not None:
        [numbers] = selected.nonzero()
        selected[:] = False
        selected[numbers[:: wanted.every]] = True
    elif wanted.fps is not None and selected.any():
        selected &= _shown_at(ticks, start, 1 / (_exact(wanted.fps).limit_denominator(RATE_DENOMINATOR) * time_base))
    return selected


def find_earlier(selected: NDArray[np.bool_], first: int, count: int) -> int:
    """The number of the frame from which on `count` frames before frame `first` are processed, or as many as are.

    `first` itself if there are none. `selected` is bool (frames) of the whole recording.
    """
    [numbers] = selected[:first].nonzero()
    return int(numbers[-min(count, len(numbers))]) if count and len(numbers) else first


def _shown_at(ticks: NDArray[np.int64], start: int, period: Fraction) -> NDArray[np.bool_]:
    """Whether a frame is on the screen at one of start, start + period, …; the last is there for one tick."""
    begins = np.append(ticks, ticks[-1] + 1) - start
    moments_before = np.maximum(0, -(-begins * period.denominator // period.numerator))
    shown: NDArray[np.bool_] = moments_before[:-1] < moments_before[1:]
    return shown


def _first_tick(seconds: float, time_base: Fraction) -> int:
    """The first whole tick that is not before `seconds`."""
    ticks = _exact(seconds) / time_base
    return -(-ticks.numerator // ticks.denominator)


def _exact(number: float) -> Fraction:
    return Fraction(repr(number))
