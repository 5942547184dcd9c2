"""The boundary F-score: squares that were shifted, by hand, and against a dilation with a disc, pixel by pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.inference.boundaries import UNCOMPARED, choose_tolerance, score_boundaries

Map = NDArray[np.uint8]


def square(*, top: int, left: int, side: int, shape: tuple[int, int] = (60, 60)) -> Map:
    labels = np.full(shape, 1, dtype=np.uint8)
    labels[top : top + side, left : left + side] = 2
    return labels


@pytest.mark.parametrize(
    ("height", "width", "pixels"),
    [(1, 1, 1), (100, 100, 1), (512, 683, 6), (1080, 1920, 17), (160, 120, 2), (199, 1, 1), (200, 1, 2)],
)
def test_the_tolerance_is_a_share_of_the_diagonal(height: int, width: int, pixels: int) -> None:
    assert choose_tolerance(height, width) == pixels


def test_a_square_in_its_place_is_perfect_and_others_have_no_score() -> None:
    labels = square(top=20, left=20, side=10)
    scores = score_boundaries(labels, labels, tolerance=1)
    assert scores[[1, 2]].tolist() == [1, 1]
    assert np.isnan(np.delete(scores, [1, 2])).all()


def test_a_square_shifted_by_no_more_than_the_tolerance_is_perfect() -> None:
    truth, mask = square(top=20, left=20, side=10), square(top=20, left=22, side=10)
    assert score_boundaries(truth, mask, tolerance=2)[2] == 1
    assert score_boundaries(truth, mask, tolerance=1)[2] < 1


def test_a_shifted_square_by_hand() -> None:
    """Side 10: a ring of 36 pixels. Shifted right by 4, with tolerance 1: of its left side, its two corners touch the
    other's top and bottom, and so do the next pixels inwards, at distance 1; the other 6 are alone. The top and bottom
    sides reach from column 24 to 33 and the other's from 20 to 29, so columns 24 to 30 match and 31 to 33 do not. Of
    the right side, the 8 between are alone: 36 - 6 - 2 × 3 - 8 = 16. By symmetry the recall is the same.
    """
    truth, mask = square(top=20, left=20, side=10), square(top=20, left=24, side=10)
    assert score_boundaries(truth, mask, tolerance=1)[2] == pytest.approx(16 / 36)


def test_a_square_far_off_scores_nothing() -> None:
    truth, mask = square(top=5, left=5, side=10), square(top=40, left=40, side=10)
    assert score_boundaries(truth, mask, tolerance=3)[2] == 0


def test_precision_and_recall_are_weighed_alike() -> None:
    """Two squares of one size where the truth has one: half of what was found is right, all that is there was found."""
    truth = square(top=5, left=5, side=10)
    mask = truth.copy()
    mask[40:50, 40:50] = 2
    assert score_boundaries(truth, mask, tolerance=1)[2] == pytest.approx(2 * 0.5 / 1.5)
    assert score_boundaries(mask, truth, tolerance=1)[2] == pytest.approx(2 * 0.5 / 1.5)


def test_the_tolerance_is_a_disc() -> None:
    """One pixel each, 3 down and 4 across: 5 apart."""
    truth, mask = square(top=20, left=20, side=1), square(top=23, left=24, side=1)
    assert score_boundaries(truth, mask, tolerance=5)[2] == 1
    assert score_boundaries(truth, mask, tolerance=4)[2] == 0


def test_a_class_on_one_side_only_scores_0() -> None:
    truth, mask = square(top=20, left=20, side=10), np.full((60, 60), 1, dtype=np.uint8)
    for scores in (score_boundaries(truth, mask, tolerance=2), score_boundaries(mask, truth, tolerance=2)):
        assert scores[[1, 2]].tolist() == [0, 0]


def test_the_edge_of_the_image_is_no_boundary() -> None:
    whole = np.full((9, 9), 4, dtype=np.uint8)
    assert np.isnan(score_boundaries(whole, whole, tolerance=1)).all()


def test_a_match_does_not_reach_round_the_side_of_the_image() -> None:
    truth, mask = np.full((2, 10, 10), 1, dtype=np.uint8)
    truth[5, 9] = mask[5, 0] = mask[6, 0] = 2
    assert score_boundaries(truth, mask, tolerance=2)[2] == 0


@given(st.integers(0, 10_000), st.integers(1, 26), st.integers(1, 26), st.integers(1, 4), st.sampled_from([2, 4, 9]))
@settings(max_examples=80, deadline=None)
def test_it_equals_a_dilation_with_a_disc(seed: int, height: int, width: int, tolerance: int, grain: int) -> None:
    rng = np.random.default_rng(seed)
    truth, mask = (
        rng.integers(0, 4, (-(-height // grain), -(-width // grain)), dtype=np.uint8)
        .repeat(grain, axis=0)
        .repeat(grain, axis=1)[:height, :width]
        for _ in range(2)
    )
    void = rng.random((height, width)) < 0.05
    truth, mask = np.where(void, UNCOMPARED, truth).astype(np.uint8), np.where(void, UNCOMPARED, mask).astype(np.uint8)
    scores = score_boundaries(truth, mask, tolerance=tolerance)
    for class_id in range(5):
        expected = score_plainly(truth, mask, class_id, tolerance=tolerance)
        assert scores[class_id] == pytest.approx(expected, nan_ok=True), class_id


def score_plainly(truth: Map, mask: Map, class_id: int, *, tolerance: int) -> float:
    true_edge, found_edge = outline(truth, class_id), outline(mask, class_id)
    if not true_edge.any() and not found_edge.any():
        return float("nan")
    if not true_edge.any() or not found_edge.any():
        return 0.0
    precision = (found_edge & dilate(true_edge, tolerance)).sum() / found_edge.sum()
    recall = (true_edge & dilate(found_edge, tolerance)).sum() / true_edge.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def outline(labels: Map, class_id: int) -> NDArray[np.bool_]:
    own = labels == class_id
    wide = np.pad(own, 1, mode="edge")
    inside = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    edge: NDArray[np.bool_] = own & ~inside
    return edge


def dilate(pixels: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    down, across = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
    rows, columns = np.nonzero(pixels)
    distances = (down[..., None] - rows) ** 2 + (across[..., None] - columns) ** 2
    near: NDArray[np.bool_] = (distances <= radius * radius).any(axis=2)
    return near
