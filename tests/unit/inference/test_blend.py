"""Several passes, one mask: the average of what they say, without seams, in memory that the height does not change."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from bench.logits import random_pixels, random_queries, structured_queries
from shared.inference import blend as blend_module
from shared.inference.modes import MODES
from shared.inference.passes import Area, Pass, plan
from shared.inference.postprocess import PixelLogits, QueryLogits, combine, label
from shared.inference.recipe import Recipe

Prediction = PixelLogits | QueryLogits
Size = tuple[int, int]


def random_prediction(kind: str, shown: Pass, seed: int) -> Prediction:
    """A model's answer to a pass, at a quarter of its input."""
    width, height = (-(-side // 4) for side in shown.padded)
    if kind == "pixels":
        return random_pixels(height, width, channels=9, seed=seed)
    return random_queries(height, width, queries=8, channels=9, seed=seed)


def textbook(predictions: list[tuple[Pass, Prediction]], size: Size) -> torch.Tensor:
    """Everything at full size in double precision: (channels, height, width), every pixel's scores adding up."""
    width, height = size
    total, weight = torch.zeros((9, height, width), dtype=torch.float64), torch.zeros((height, width)).double()
    for shown, prediction in predictions:
        planes = (prediction.logits if isinstance(prediction, PixelLogits) else prediction.masks).double()
        # The padding is cut off at the model's input, as a model with padding is evaluated, then back to the area.
        if shown.padded != shown.size:
            planes = at_positions(planes, shown)
        else:
            planes = functional.interpolate(planes[None], size=(shown.area.height, shown.area.width), mode="bilinear")[
                0
            ]
        if shown.mirrored:
            planes = planes.flip(2)
        if isinstance(prediction, PixelLogits):
            scores = planes.softmax(dim=0)
        else:
            chances = prediction.classes.double().softmax(dim=-1)[:, :-1]
            scores = torch.einsum("qc,qhw->chw", chances, planes.sigmoid())
        fade = torch.outer(*(tent(side) for side in (shown.area.height, shown.area.width)))
        part = (
            slice(shown.area.top, shown.area.top + shown.area.height),
            slice(shown.area.left, shown.area.left + shown.area.width),
        )
        total[:, *part] += scores * fade
        weight[part] += fade
    return total / weight


def at_positions(planes: torch.Tensor, shown: Pass) -> torch.Tensor:
    """Bilinear values of padded planes under the centre of each pixel of the area."""
    grids = []
    for length, size, padded in ((shown.area.height, *heights(shown)), (shown.area.width, *widths(shown))):
        centre = (torch.arange(length).double() + 0.5) * size / length  # in pixels of the padded input
        grids.append(centre / padded * 2 - 1)
    grid = torch.stack(torch.meshgrid(grids[0], grids[1], indexing="ij")[::-1], dim=-1)
    return functional.grid_sample(planes[None], grid[None], padding_mode="border", align_corners=False)[0]


def heights(shown: Pass) -> tuple[int, int]:
    return shown.size[1], shown.padded[1]


def widths(shown: Pass) -> tuple[int, int]:
    return shown.size[0], shown.padded[0]


def tent(length: int) -> torch.Tensor:
    position = torch.arange(length).double() + 0.5
    return torch.minimum(position, length - position)


def assert_best(mask: np.ndarray, scores: torch.Tensor) -> None:
    chosen = scores.gather(0, torch.from_numpy(mask.astype(np.int64))[None])[0]
    assert ((scores.max(dim=0).values - chosen) < 1e-5).all()


RECIPES = {
    "tiles": Recipe(tiles=True, input_size=64),
    "tta": Recipe(tta=True, input_size=64),
    "tiles and tta": Recipe(tiles=True, tta=True, input_size=64, tile_overlap=0.5),
    "published": Recipe(resize="published"),
    "published and tta": Recipe(resize="published", tta=True),
}


@pytest.mark.parametrize("kind", ["pixels", "queries"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_pixel_gets_the_class_with_the_highest_average(name: str, kind: str) -> None:
    size = (150, 97)
    passes = plan(*size, MODES["sota"], RECIPES[name])
    predictions = [(shown, random_prediction(kind, shown, seed)) for seed, shown in enumerate(passes)]
    labels = combine(predictions, size=size, channel_offset=0, confidence=True)
    scores = textbook(predictions, size)
    assert_best(labels.mask, scores)
    share = (scores.max(dim=0).values / scores.sum(dim=0) * 255).numpy()
    assert labels.confidence is not None
    assert np.abs(labels.confidence - share).max() <= 0.5 + 1e-3


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    kind=st.sampled_from(["pixels", "queries"]),
    overlap=st.sampled_from([0.0, 0.2, 0.5]),
    tile_bytes=st.sampled_from([1, 50_000, 2**26]),
    columns=st.sampled_from([7, 64, 1024]),
)
@settings(max_examples=60, deadline=None)
def test_the_parts_that_are_computed_together_cannot_be_seen(
    size: Size, kind: str, overlap: float, tile_bytes: int, columns: int
) -> None:
    passes = plan(*size, MODES["sota"], Recipe(tiles=True, input_size=64, tile_overlap=overlap))
    predictions = [(shown, random_prediction(kind, shown, seed)) for seed, shown in enumerate(passes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_module, "TILE_BYTES", tile_bytes)
        patch.setattr(blend_module, "TILE_COLUMNS", columns)
        labels = combine(predictions, size=size, channel_offset=0)
    assert_best(labels.mask, textbook(predictions, size))


def test_one_pass_blended_is_one_pass_labelled() -> None:
    [shown] = plan(120, 90, MODES["sota"], Recipe(input_size=96))
    prediction = structured_queries(shown.size[1] // 4, shown.size[0] // 4, queries=20, active=6, channels=9)
    blended = combine([(shown, prediction)], size=(120, 90), channel_offset=3, confidence=True, unlabeled_below=0.5)
    labelled = label(prediction, size=(120, 90), channel_offset=3, confidence=True, unlabeled_below=0.5)
    assert (blended.mask == labelled.mask).mean() > 0.999
    assert blended.mask.min() == 0
    assert blended.confidence is not None
    assert labelled.confidence is not None
    assert np.abs(blended.confidence.astype(int) - labelled.confidence).max() <= 1


def test_tiles_that_agree_leave_no_seam() -> None:
    size = (200, 60)
    passes = plan(*size, MODES["sota"], Recipe(tiles=True, input_size=64))
    planes = torch.tensor([1.0, 3.0, 2.0])[:, None, None].expand(3, 16, 16)
    labels = combine(((shown, PixelLogits(planes)) for shown in passes), size=size, channel_offset=0, confidence=True)
    assert (labels.mask == 1).all()
    assert labels.confidence is not None
    assert len(np.unique(labels.confidence)) == 1


def test_between_two_tiles_that_differ_one_fades_into_the_other() -> None:
    left, right = Area(0, 0, 8, 64), Area(0, 32, 8, 64)
    predictions = [
        (Pass(area, (64, 32), (64, 32)), PixelLogits(planes.log()[:, None, None].expand(2, 8, 16)))
        for area, planes in ((left, torch.tensor([0.9, 0.1])), (right, torch.tensor([0.1, 0.9])))
    ]
    labels = combine(predictions, size=(96, 8), channel_offset=0, confidence=True)
    assert labels.confidence is not None
    row = labels.confidence[0].astype(int)
    assert (labels.mask[0, :48] == 0).all()
    assert (labels.mask[0, 48:] == 1).all()
    assert row[0] == row[-1] == round(0.9 * 255)
    assert (np.diff(row[32:48]) < 0).all()
    assert (np.diff(row[48:64]) > 0).all()


def test_what_is_labelled_is_dropped_before_the_next_tiles_are_asked_for() -> None:
    size = (64, 64 * 20)
    passes = plan(*size, MODES["sota"], Recipe(tiles=True, input_size=64, tile_overlap=0.0))
    alive: list[int] = []
    made = 0

    class Counted(PixelLogits):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__(logits)
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def predict() -> Iterator[tuple[Pass, Prediction]]:
        nonlocal made
        for shown in passes:
            made += 1
            yield shown, Counted(torch.randn((5, 16, 16)))
            assert len(alive) <= 3

    combine(predict(), size=size, channel_offset=0)
    assert made == 20


def test_a_checkpoint_can_stop_it() -> None:
    [shown] = plan(120, 90, MODES["sota"], Recipe(input_size=96))

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        combine([(shown, random_prediction("queries", shown, 0))], size=(120, 90), channel_offset=0, checkpoint=stop)
