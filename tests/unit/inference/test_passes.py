"""The passes of a mask: which parts of an image the model is shown, and at which sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.inference.errors import MediaLimit
from shared.inference.modes import MODES
from shared.inference.passes import MAX_PASSES, Area, Pass, plan, split
from shared.inference.recipe import Recipe
from shared.inference.resize import STRIDE, fit_size

SOTA = MODES["sota"]


def test_without_options_one_pass_shows_the_whole_image() -> None:
    size = fit_size(1920, 1080, 1024)
    assert plan(1920, 1080, SOTA, Recipe()) == (Pass(Area(0, 0, 1080, 1920), size, size),)


@pytest.mark.parametrize(
    ("mode", "width", "height", "size", "padded"),
    [
        # ADE20K's usual 683×512 by each model's evaluation, computed by hand from its configuration.
        ("sota", 683, 512, (854, 640), (864, 640)),
        ("sota", 512, 683, (640, 854), (640, 864)),
        ("sota", 6000, 1000, (2560, 427), (2560, 448)),
        ("accurate", 683, 512, (704, 512), (704, 512)),
        ("accurate", 6000, 1000, (2048, 352), (2048, 352)),
        ("balanced", 500, 375, (693, 520), (693, 520)),
        ("fast", 333, 500, (520, 780), (520, 780)),
    ],
)
def test_published_is_how_each_model_was_evaluated(
    mode: str, width: int, height: int, size: tuple[int, int], padded: tuple[int, int]
) -> None:
    [shown] = plan(width, height, MODES[mode], Recipe(resize="published"))
    assert (shown.size, shown.padded) == (size, padded)


def test_a_mode_without_a_protocol_of_its_own_is_resized_as_ever() -> None:
    assert plan(640, 480, MODES["demo"], Recipe(resize="published")) == plan(640, 480, MODES["demo"], Recipe())


def test_tta_is_the_published_multi_scale_protocol() -> None:
    passes = plan(683, 512, SOTA, Recipe(resize="published", tta=True))
    assert [shown.size[1] for shown in passes if not shown.mirrored] == [320, 480, 640, 800, 960, 1120]
    assert [shown.mirrored for shown in passes] == [False, True] * 6


@given(
    width=st.integers(1, 2500),
    height=st.integers(1, 2500),
    input_size=st.sampled_from([128, 256, 500, 1024]),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_tiles_cover_every_pixel_and_share_their_borders(
    width: int, height: int, input_size: int, overlap: float
) -> None:
    passes = plan(width, height, SOTA, Recipe(tiles=True, input_size=input_size, tile_overlap=overlap))
    seen = np.zeros((height, width), dtype=np.uint8)
    for shown in passes:
        area = shown.area
        assert 0 <= area.left < area.left + area.width <= width
        assert 0 <= area.top < area.top + area.height <= height
        assert shown.size[0] % STRIDE == shown.size[1] % STRIDE == 0
        seen[area.top : area.top + area.height, area.left : area.left + area.width] = 1
    assert seen.all()
    assert [shown.area.top for shown in passes] == sorted(shown.area.top for shown in passes)
    row = sorted({(shown.area.left, shown.area.width) for shown in passes})
    for (left, across), (following, _) in itertools.pairwise(row):
        assert left + across - following >= int(across * overlap) - 1


def test_tiles_show_the_image_at_its_own_resolution() -> None:
    passes = plan(3000, 2000, SOTA, Recipe(tiles=True))
    assert {(shown.area.width, shown.area.height) for shown in passes} == {(1024, 1024)}
    assert {shown.size for shown in passes} == {(1024, 1024)}


def test_an_image_no_larger_than_a_tile_is_shown_as_ever() -> None:
    assert plan(1000, 700, SOTA, Recipe(tiles=True)) == plan(1000, 700, SOTA, Recipe())


def test_an_image_of_too_many_tiles_is_refused() -> None:
    with pytest.raises(MediaLimit, match=str(MAX_PASSES)):
        plan(8000, 8000, SOTA, Recipe(tiles=True, input_size=64))


@given(
    width=st.integers(1, 2500),
    height=st.integers(1, 2500),
    parts=st.sampled_from([2, 4]),
    tta=st.booleans(),
    tiles=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_split_passes_cover_the_same_at_the_same_scale(
    width: int, height: int, parts: int, tta: bool, tiles: bool
) -> None:
    whole = plan(width, height, SOTA, Recipe(tta=tta, tiles=tiles))
    passes = split(whole, parts)
    seen = np.zeros((height, width), dtype=np.int32)
    for shown in passes:
        area = shown.area
        seen[area.top : area.top + area.height, area.left : area.left + area.width] += 1
    assert seen.min() >= (12 if tta else 1)
    assert [shown.area.top for shown in passes] == sorted(shown.area.top for shown in passes)
    if min(width, height) >= 512:
        assert len(passes) <= len(whole) * parts**2
        largest = max(np.prod(shown.padded) for shown in passes)
        assert largest <= 0.75 * max(np.prod(shown.padded) for shown in whole)


def test_a_square_of_1024_in_two_parts_a_side_takes_about_a_third() -> None:
    whole = plan(1024, 1024, SOTA, Recipe())
    assert {shown.size for shown in split(whole, 2)} == {(608, 608)}
    assert {shown.size for shown in split(whole, 4)} == {(320, 320)}
    assert len(split(whole, 4)) == 16


@pytest.mark.parametrize("shape", [(1, 64_000_000), (64_000_000, 1), (1, 1)])
@pytest.mark.parametrize("mode", ["fast", "accurate", "sota"])
def test_an_image_as_thin_as_a_line_does_not_become_a_mountain(mode: str, shape: tuple[int, int]) -> None:
    [shown] = plan(*shape, MODES[mode], Recipe(resize="published"))
    assert shown.padded[0] * shown.padded[1] <= 64 * 520 * 520 * 1.01
    assert min(shown.padded) >= STRIDE or mode == "fast"
