"""What the demo measures and draws."""

import io

import numpy as np
import pytest
from PIL import Image

from cli.demo import SCENE, measure_miou
from cli.picture import draw_comparison
from shared.inference.demo.scenes import draw_scene
from shared.inference.labels import ADE20K, DEMO

MASK = np.array([[1, 1, 2, 2], [1, 1, 2, 2]], dtype=np.uint8)


def test_the_same_mask_is_perfect() -> None:
    assert measure_miou(MASK, MASK) == (1.0, {"sky": 1.0, "sun": 1.0})


def test_a_class_counts_whether_it_was_missed_or_made_up() -> None:
    made_up = np.where(np.arange(4) == 3, 3, MASK).astype(np.uint8)  # the last column of 2 is taken for 3
    expected = (round((1 + 1 / 2 + 0) / 3, 4), {"sky": 1.0, "sun": 0.5, "hill": 0.0})
    assert measure_miou(made_up, MASK) == expected
    assert measure_miou(MASK, made_up) == expected


def test_nothing_but_background_is_worth_nothing() -> None:
    assert measure_miou(np.zeros_like(MASK), np.zeros_like(MASK)) == (0.0, {})


def test_the_picture_shows_image_and_mask_side_by_side_and_is_small() -> None:
    scene = draw_scene(SCENE)
    drawn = draw_comparison(scene.image, scene.labels, DEMO)
    assert len(drawn) < 400_000
    with Image.open(io.BytesIO(drawn)) as picture:
        assert picture.width > 2 * picture.height * 0.9


@pytest.mark.parametrize("count", [1, 150])
def test_a_legend_has_room_for_every_class(count: int) -> None:
    labels = np.arange(1, count + 1, dtype=np.uint8).reshape(1, count).repeat(20, axis=0)
    few = draw_comparison(np.zeros((20, count, 3), dtype=np.uint8), labels, ADE20K)
    with Image.open(io.BytesIO(few)) as picture:
        assert picture.height > 20
