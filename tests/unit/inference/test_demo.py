"""The demo's world and its model: scenes are exact and repeatable, and the model labels places it has never seen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.inference.demo.scenes import draw_scene
from shared.inference.engine import Engine
from shared.inference.labels import DEMO
from shared.inference.masks import encode_png
from shared.inference.media import read_image

UNSEEN = 5_000_000
"""Seeds from here on were neither trained on nor measured by the training script."""


def test_a_seed_is_a_place_and_gives_the_same_bytes_every_time() -> None:
    first, again, elsewhere = draw_scene(3), draw_scene(3), draw_scene(4)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.labels, elsewhere.labels)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 10_000), st.floats(0, 100))
@settings(max_examples=40, deadline=None)
def test_a_scene_can_have_any_size_and_labels_every_pixel(width: int, height: int, seed: int, moment: float) -> None:
    scene = draw_scene(seed, width=width, height=height, time_seconds=moment)
    assert scene.image.shape == (height, width, 3)
    assert scene.labels.shape == (height, width)
    assert scene.image.dtype == scene.labels.dtype == np.uint8
    assert 1 <= scene.labels.min() <= scene.labels.max() < len(DEMO.classes)


def test_a_place_keeps_its_layout_at_another_size() -> None:
    small, large = draw_scene(5, width=160, height=120), draw_scene(5, width=640, height=480)
    assert (small.labels == large.labels[2::4, 2::4]).mean() > 0.97


def test_every_class_occurs_and_things_hide_each_other() -> None:
    labels = [draw_scene(seed, width=160, height=120).labels for seed in range(20)]
    assert set(np.unique(np.stack(labels)).tolist()) == set(range(1, len(DEMO.classes)))


def test_time_moves_cars_and_leaves_houses_standing() -> None:
    now, later = draw_scene(8, time_seconds=0), draw_scene(8, time_seconds=0.6)
    car, house = DEMO.classes.index("car"), DEMO.classes.index("house")
    moved = (now.labels == car) != (later.labels == car)
    assert moved.sum() > 0.2 * (now.labels == car).sum() > 0
    still = (now.labels == house) & (later.labels == house)
    assert still.sum() > 0.9 * (now.labels == house).sum() > 0


@pytest.mark.parametrize(("width", "height"), [(640, 480), (512, 384), (1280, 720)])
def test_the_demo_model_labels_scenes_it_has_never_seen(width: int, height: int) -> None:
    engine = Engine(device="cpu", offline=True)
    overlap, union = np.zeros(len(DEMO.classes)), np.zeros(len(DEMO.classes))
    for seed in range(UNSEEN, UNSEEN + 8):
        scene = draw_scene(seed, width=width, height=height, time_seconds=seed % 7)
        image = read_image(encode_png(scene.image), max_pixels=10_000_000)
        mask = engine.segment(image, "demo").mask
        for class_id in range(1, len(DEMO.classes)):
            truth, guess = scene.labels == class_id, mask == class_id
            overlap[class_id] += (truth & guess).sum()
            union[class_id] += (truth | guess).sum()
    ious = overlap[1:] / union[1:]
    assert ious.mean() >= 0.85, dict(zip(DEMO.classes[1:], ious.round(3), strict=True))
    assert ious.min() >= 0.6, dict(zip(DEMO.classes[1:], ious.round(3), strict=True))
