"""The scores are those of the benchmarks: by hand, and as torchmetrics counts them."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn of packages that it could also use
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from shared.inference.errors import InvalidMedia
from shared.inference.labels import ADE20K, VOC
from shared.inference.metrics import PROTOCOLS, Scores, Tally

Map = NDArray[np.uint8]


def rows(*lines: str) -> Map:
    """A map typed as digits; `v` is VOC's void."""
    return np.array([[255 if each == "v" else int(each) for each in line] for line in lines], dtype=np.uint8)


def score(label_space: str, *pairs: tuple[Map, Map]) -> Scores:
    tally = Tally(PROTOCOLS[label_space])
    for truth, mask in pairs:
        tally.add(truth=truth, mask=mask)
    return tally.score()


def random_map(seed: int, ids: list[int], *, shape: tuple[int, int]) -> Map:
    return np.random.default_rng(seed).choice(np.array(ids, dtype=np.uint8), shape)


def test_a_confusion_matrix_counted_by_hand() -> None:
    """Rows are the truth: class 1 is found 3 of 4 times, class 2 in 2 of 4, class 3 is made up once."""
    found = score("ade20k", (rows("1111", "2222"), rows("1112", "2213")))
    one, two, three = found.classes[:3]
    assert (one.id, one.name, one.pixels) == (1, "wall", 4)
    assert one.iou == pytest.approx(3 / 5)
    assert two.iou == pytest.approx(2 / 5)
    assert three.iou == 0
    assert (one.accuracy, two.accuracy, three.accuracy) == (3 / 4, 2 / 4, None)
    assert found.miou == pytest.approx((3 / 5 + 2 / 5 + 0) / 3)
    assert found.mean_accuracy == pytest.approx((3 / 4 + 2 / 4) / 2)
    assert found.pixel_accuracy == 5 / 8
    assert (found.images, found.pixels) == (1, 8)


def test_a_class_that_neither_has_is_left_out_of_the_mean() -> None:
    found = score("ade20k", (rows("11", "22"), rows("11", "22")))
    assert found.miou == found.mean_accuracy == found.pixel_accuracy == 1
    assert [each.iou for each in found.classes[:3]] == [1, 1, None]
    assert len(found.classes) == 150


def test_ade20k_ignores_what_is_unlabeled_and_nothing_else() -> None:
    found = score("ade20k", (rows("0011"), rows("2311")))
    assert found.pixels == 2
    assert found.miou == found.pixel_accuracy == 1
    assert found.classes[1].iou is None
    assert [each.id for each in found.classes] == list(range(1, 151))


def test_a_mask_that_leaves_a_labeled_pixel_unlabeled_misses_it() -> None:
    found = score("ade20k", (rows("1111"), rows("1110")))
    assert found.classes[0].iou == found.miou == found.pixel_accuracy == 3 / 4


def test_voc_ignores_void_and_counts_background() -> None:
    found = score("voc", (rows("00v5", "00v5"), rows("0105", "0005")))
    background, aeroplane = found.classes[0], found.classes[1]
    assert (background.name, background.iou, background.pixels) == ("background", 3 / 4, 4)
    assert aeroplane.iou == 0
    assert found.pixels == 6
    assert found.miou == pytest.approx((3 / 4 + 0 + 1) / 3)


def test_intersections_and_unions_are_summed_over_images_before_they_are_divided() -> None:
    found = score("ade20k", (rows("11"), rows("12")), (rows("1122"), rows("1122")))
    assert found.classes[0].iou == 3 / 4
    assert found.classes[1].iou == 2 / 3
    assert found.images == 2


@given(st.integers(0, 10_000), st.integers(1, 3), st.sets(st.integers(0, 20), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_the_figures_are_those_of_torchmetrics(seed: int, images: int, ids: set[int]) -> None:
    truth = random_map(seed, [*sorted(ids), 255], shape=(images, 7 * 9))
    mask = random_map(seed + 1, sorted(ids | {3}), shape=truth.shape)
    if (truth == 255).all():
        return
    pairs = [(each.reshape(7, 9), other.reshape(7, 9)) for each, other in zip(truth, mask, strict=True)]
    ours = score("voc", *pairs)
    predicted, target = torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(truth.astype(np.int64))
    classes = len(VOC.classes)
    assert ours.miou == pytest.approx(
        float(MulticlassJaccardIndex(num_classes=classes, ignore_index=255)(predicted, target)), abs=1e-6
    )
    each_iou = MulticlassJaccardIndex(num_classes=classes, ignore_index=255, average="none")(predicted, target)
    for mine, theirs in zip(ours.classes, each_iou, strict=True):
        assert (mine.iou or 0) == pytest.approx(float(theirs), abs=1e-6)
    overall = MulticlassAccuracy(num_classes=classes, ignore_index=255, average="micro")(predicted, target)
    assert ours.pixel_accuracy == pytest.approx(float(overall), abs=1e-6)
    each_accuracy = MulticlassAccuracy(num_classes=classes, ignore_index=255, average="none")(predicted, target)
    in_truth = [float(each_accuracy[mine.id]) for mine in ours.classes if mine.pixels]
    assert ours.mean_accuracy == pytest.approx(float(np.mean(in_truth)), abs=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_so_they_are_where_the_first_id_is_ignored(seed: int) -> None:
    """Random masks of ADE20K: torchmetrics knows the same rule as `ignore_index=0` of 151 classes."""
    truth = random_map(seed, [0, 1, 7, 150], shape=(8, 8))
    mask = random_map(seed + 1, [1, 7, 30, 150], shape=(8, 8))
    ours = score("ade20k", (truth, mask))
    judge = MulticlassJaccardIndex(num_classes=len(ADE20K.classes), ignore_index=0)
    theirs = judge(torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(truth.astype(np.int64)))
    assert ours.miou == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize(
    ("label_space", "truth", "mask", "says"),
    [
        ("ade20k", "12", "123", "The truth has 2×1 pixels and the mask 3×1"),
        ("demo", "1v", "11", "The truth has pixels of id 255, which demo does not know"),
        ("voc", "01", "0v", "The mask has pixels of id 255, which voc does not know"),
        ("ade20k", "0v", "01", "The truth has pixels of id 255, which ade20k does not know"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_not_counted(label_space: str, truth: str, mask: str, says: str) -> None:
    tally = Tally(PROTOCOLS[label_space])
    tally.add(truth=rows("12"), mask=rows("12"))
    with pytest.raises(InvalidMedia, match=says):
        tally.add(truth=rows(truth), mask=rows(mask))
    assert (tally.score().images, tally.score().miou) == (1, 1)


def test_without_a_labeled_pixel_there_is_no_score() -> None:
    with pytest.raises(InvalidMedia, match="no labeled pixel"):
        score("ade20k", (rows("00"), rows("12")))


def test_boundaries_count_by_image_and_by_class() -> None:
    """The second image has no boundary, so the mean over images is the first one's."""
    square = np.full((20, 20), 1, dtype=np.uint8)
    square[5:15, 5:15] = 2
    whole = np.full((20, 20), 1, dtype=np.uint8)
    found = score("ade20k", (square, square), (whole, whole))
    assert found.boundary_f == 1
    assert [each.boundary_f for each in found.classes[:3]] == [1, 1, None]


def test_a_set_without_boundaries_has_no_boundary_score() -> None:
    whole = np.full((4, 4), 1, dtype=np.uint8)
    assert score("ade20k", (whole, whole)).boundary_f is None


def test_what_a_mask_says_of_ignored_pixels_moves_no_score() -> None:
    truth = random_map(1, [0, 4, 5], shape=(30, 40))
    mask = random_map(2, [4, 5], shape=truth.shape)
    other = np.where(truth == 0, 9 - mask, mask).astype(np.uint8)
    assert score("ade20k", (truth, mask)) == score("ade20k", (truth, other))
