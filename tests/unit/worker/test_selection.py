"""The frames that were asked for, and no others, whatever the frame rate."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from shared.contract import Frames
from worker.selection import find_earlier, select_frames

TICK = Fraction(1, 12800)


def selected(pts: list[int], **wanted: Any) -> list[int]:
    return list(map(int, select_frames(np.array(pts, dtype=np.int64), TICK, Frames(**wanted)).nonzero()[0]))


STEADY = [512 * number for number in range(50)]  # 25 frames per second


def test_all_frames_unless_said_otherwise() -> None:
    assert selected(STEADY) == list(range(50))


def test_every_third_begins_with_the_first() -> None:
    assert selected(STEADY, every=3) == list(range(0, 50, 3))


def test_a_span_has_its_first_moment_and_not_its_last() -> None:
    assert selected(STEADY, from_seconds=0.4, to_seconds=0.8) == list(range(10, 20))


def test_every_third_of_a_span_begins_with_the_spans_first() -> None:
    assert selected(STEADY, from_seconds=0.4, to_seconds=0.8, every=3) == [10, 13, 16, 19]


def test_seconds_count_from_the_first_frame_wherever_its_timestamp_is() -> None:
    assert selected([each - 1024 for each in STEADY], from_seconds=0.4, to_seconds=0.8) == list(range(10, 20))


@pytest.mark.parametrize(("fps", "frames"), [(5, range(0, 50, 5)), (25, range(50)), (1000, range(50)), (0.5, [0])])
def test_a_rate_takes_the_frames_on_the_screen_at_its_moments(fps: float, frames: Any) -> None:
    assert selected(STEADY, fps=fps) == list(frames)


def test_a_rate_that_does_not_divide_the_recordings_keeps_its_number_of_frames() -> None:
    assert selected(STEADY, fps=10) == [int(2.5 * number) for number in range(20)]


def test_a_rate_over_a_variable_one_skips_what_comes_too_soon_and_repeats_nothing() -> None:
    # Ten frames within a tenth of a second, then one second of stillness.
    assert selected([128 * number for number in range(10)] + [12_800], fps=4) == [0, 9, 10]
    assert selected([128 * number for number in range(10)] + [12_800], fps=200) == [0, *range(1, 10), 10]
    assert selected([10 * number for number in range(10)] + [12_800], fps=200) == [0, 6, 9, 10]


def test_a_rate_in_a_span_begins_with_the_span() -> None:
    assert selected(STEADY, from_seconds=1, fps=5) == [25, 30, 35, 40, 45]


def test_a_span_after_the_end_has_no_frames() -> None:
    assert selected(STEADY, from_seconds=100) == []
    assert selected(STEADY, from_seconds=100, fps=3) == []


def test_hours_at_an_odd_rate_do_not_drift() -> None:
    pts = [1001 * number for number in range(400_000)]  # of 1/30000 s
    found = select_frames(np.array(pts, dtype=np.int64), Fraction(1, 30_000), Frames(fps=10)).nonzero()[0]
    assert [int(each) for each in found[-3:]] == [
        1001 * 0 + (3000 * number) // 1001 for number in range(133_464, 133_467)
    ]


# --- frames to look back at ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "count", "earlier"),
    [(20, 0, 20), (20, 1, 18), (20, 3, 12), (22, 3, 15), (6, 5, 3), (3, 5, 3), (0, 5, 0), (50, 2, 45)],
)
def test_what_is_looked_back_at_are_frames_that_are_processed(first: int, count: int, earlier: int) -> None:
    processed = select_frames(np.array(STEADY, dtype=np.int64), TICK, Frames(every=3, from_seconds=0.12))
    assert find_earlier(processed, first, count) == earlier
