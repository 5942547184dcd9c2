"""The filter against flicker: what it leaves alone, what it removes, how late it is, and that cuts do not show."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.inference.smoothing import Smoother

Mask = NDArray[np.uint8]


def smooth_all(masks: Sequence[Mask | None], window: int) -> list[Mask | None]:
    smoother = Smoother(window)
    return [smoother.smooth(mask) for mask in masks]


def smooth_pixel(labels: str, window: int) -> str:
    """Of one pixel, a letter for every frame's label, "-" for a frame without a mask."""
    masks = [None if letter == "-" else np.full((1, 1), ord(letter), np.uint8) for letter in labels]
    return "".join("-" if mask is None else chr(mask[0, 0]) for mask in smooth_all(masks, window))


def smooth_by_the_formula(masks: Sequence[Mask], window: int) -> list[Mask]:
    """s(t) as the docstring has it, a pixel at a time."""
    smooth = []
    for t, mask in enumerate(masks):
        chosen = mask.copy()
        for place in np.ndindex(mask.shape):
            for i in range(min(window - 1, t)):
                if masks[t - i][place] == masks[t - i - 1][place]:
                    chosen[place] = masks[t - i][place]
                    break
        smooth.append(chosen)
    return smooth


def make_unrest(frames: int, shape: tuple[int, int] = (9, 11), *, classes: int = 3, seed: int = 1) -> list[Mask]:
    return list(np.random.default_rng(seed).integers(0, classes, (frames, *shape), dtype=np.uint8))


@pytest.mark.parametrize("window", [3, 5, 15])
@pytest.mark.parametrize(
    ("labels", "smooth"),
    [
        ("aaaaaaaa", "aaaaaaaa"),
        ("aaabaaaa", "aaaaaaaa"),
        ("aaaabbbb", "aaaaabbb"),
        ("aaabbaaa", "aaaabbaa"),
        ("aabcaaaa", "aaa?aaaa"),
    ],
    ids=["what stays is left alone", "a flicker of one frame goes", "a change comes one frame late",
         "what lasts for two frames is shown for two", "of unlike flickers only what the window still sees goes"],
)  # fmt: skip
def test_a_label_is_shown_once_two_frames_in_a_row_have_it(labels: str, smooth: str, window: int) -> None:
    assert smooth_pixel(labels, window) == smooth.replace("?", "c" if window == 3 else "a")


def test_a_longer_window_bridges_longer_unrest() -> None:
    assert smooth_pixel("aabababb", 3) == "aaaababb", "from the fifth frame on there is no pair in sight"
    assert smooth_pixel("aabababb", 5) == "aaaaaabb"


@pytest.mark.parametrize("window", [3, 4, 9])
def test_without_a_pair_the_newest_label_counts(window: int) -> None:
    assert smooth_pixel("abcabcabc", window) == "abcabcabc"


@pytest.mark.parametrize("window", [1, 2])
def test_a_window_of_one_or_two_changes_nothing(window: int) -> None:
    masks = make_unrest(20)
    np.testing.assert_array_equal(smooth_all(masks, window), masks)


def test_a_window_of_three_is_a_majority_of_three() -> None:
    masks = make_unrest(60, classes=2)
    smooth = smooth_all(masks, 3)
    for number in range(2, 60):
        np.testing.assert_array_equal(smooth[number], np.median(masks[number - 2 : number + 1], axis=0))


@pytest.mark.parametrize(
    ("labels", "smooth"), [("aab-aaa", "aaa-aaa"), ("aab-bbb", "aaa-bbb"), ("-aa--ba", "-aa--aa"), ("--", "--")]
)
def test_a_frame_without_a_mask_has_no_say_and_gets_none(labels: str, smooth: str) -> None:
    assert smooth_pixel(labels, 5) == smooth


def test_a_frame_without_a_mask_takes_its_place_in_the_window() -> None:
    assert smooth_pixel("aab-c", 5) == "aaa-a"
    assert smooth_pixel("aab-c", 4) == "aaa-c", "as a chunk could not know how far to look back for masks otherwise"


@pytest.mark.parametrize("window", [1, 2, 3, 5, 15])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_masks_are_those_of_the_formula(window: int, classes: int) -> None:
    masks = make_unrest(30, classes=classes)
    np.testing.assert_array_equal(smooth_all(masks, window), smooth_by_the_formula(masks, window))


def test_a_mask_larger_than_what_is_looked_at_together_is_the_same() -> None:
    masks = make_unrest(8, (700, 1100))
    rows = [smooth_all([mask[row : row + 1] for mask in masks], 5) for row in range(0, 700, 97)]
    whole = smooth_all(masks, 5)
    for number, row in enumerate(range(0, 700, 97)):
        for mask, part in zip(whole, rows[number], strict=True):
            assert mask is not None
            np.testing.assert_array_equal(mask[row : row + 1], part)


@pytest.mark.parametrize("window", [1, 3, 5, 15])
@pytest.mark.parametrize("seed", range(3))
def test_any_cut_with_the_frames_before_it_gives_the_same_bits(window: int, seed: int) -> None:
    masks: list[Mask | None] = list(make_unrest(40, seed=seed))
    for lost in np.random.default_rng(seed).choice(40, 6, replace=False):
        masks[lost] = None
    whole = smooth_all(masks, window)
    for first in range(40):
        lead = max(0, first - (window - 1))
        assert_same(smooth_all(masks[lead:], window)[first - lead :], whole[first:])


def test_one_frame_less_before_a_cut_would_show() -> None:
    """So the overlap is not longer than it must be."""
    masks = make_unrest(400, (1, 1), classes=4)
    whole = smooth_all(masks, 5)
    shown = [first for first in range(4, 400) if smooth_all(masks[first - 3 : first + 1], 5)[-1] != whole[first]]
    assert shown


def assert_same(ours: Sequence[Mask | None], theirs: Sequence[Mask | None]) -> None:
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            np.testing.assert_array_equal(own, other)


def test_what_was_given_stays_as_it_was() -> None:
    masks = make_unrest(10)
    before = [mask.copy() for mask in masks]
    smooth = smooth_all(masks, 5)
    np.testing.assert_array_equal(masks, before)
    assert not any(np.shares_memory(own, mask) for own, mask in zip(smooth, masks, strict=True) if own is not None)


def test_rows_need_not_lie_one_after_the_other() -> None:
    masks = make_unrest(10, (11, 9))
    turned = [mask.T for mask in masks]
    upright = [mask.T for mask in smooth_all(masks, 5) if mask is not None]
    np.testing.assert_array_equal(smooth_all(turned, 5), upright)


@pytest.mark.parametrize("mask", [np.zeros((2, 3), np.int64), np.zeros(6, np.uint8), np.zeros((3, 2), np.uint8)])
def test_what_is_no_mask_of_this_recording_is_refused(mask: NDArray[np.generic]) -> None:
    smoother = Smoother(3)
    smoother.smooth(np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="mask"):
        smoother.smooth(mask)  # type: ignore[arg-type]


def test_a_window_has_at_least_one_frame() -> None:
    with pytest.raises(ValueError, match="window"):
        Smoother(0)
