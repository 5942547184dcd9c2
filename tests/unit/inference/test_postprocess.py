"""From raw output to class ids: tiles against the whole plane, offsets, and stopping in between."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional

from shared.inference import postprocess
from shared.inference.postprocess import PixelLogits, QueryLogits, label

Size = tuple[int, int]


def whole_plane_scores(prediction: PixelLogits | QueryLogits, size: Size) -> torch.Tensor:
    """The textbook computation in double precision, every plane at full size."""
    width, height = size
    planes = prediction.logits if isinstance(prediction, PixelLogits) else prediction.masks
    resized = functional.interpolate(planes[None].double(), size=(height, width), mode="bilinear")[0]
    if isinstance(prediction, PixelLogits):
        return resized
    chances = prediction.classes.double().softmax(dim=-1)[:, :-1]
    return torch.einsum("qc,qhw->chw", chances, resized.sigmoid())


def assert_same_as_whole_plane(
    mask: NDArray[np.uint8], prediction: PixelLogits | QueryLogits, size: Size, offset: int
) -> None:
    """Every pixel has the winning class; only where two classes tie to the last digits may the runner-up stand."""
    scores = whole_plane_scores(prediction, size)
    assert mask.shape == (size[1], size[0])
    assert mask.dtype == np.uint8
    chosen = scores.gather(0, torch.from_numpy(mask.astype(np.int64))[None] - offset)[0]
    best = scores.max(dim=0).values
    assert (best - chosen).max().item() <= 1e-4 * max(1.0, best.abs().max().item())
    assert (chosen == best).double().mean().item() > 0.999


def random_prediction(
    kind: str, seed: int, *, planes: int = 12, height: int = 9, width: int = 14
) -> PixelLogits | QueryLogits:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((planes, height, width), generator=generator) * 4
    if kind == "pixels":
        return PixelLogits(values)
    return QueryLogits(masks=values, classes=torch.randn((planes, 8), generator=generator) * 2)


@pytest.mark.parametrize("kind", ["pixels", "queries"])
@pytest.mark.parametrize("size", [(56, 36), (100, 71), (14, 9), (7, 5), (1, 1), (1, 200), (300, 1)])
@pytest.mark.parametrize("tile_bytes", [1, 5_000, 10**9])
def test_tiles_give_what_the_whole_plane_gives(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: Size, tile_bytes: int
) -> None:
    monkeypatch.setattr(postprocess, "TILE_BYTES", tile_bytes)
    prediction = random_prediction(kind, seed=size[0])
    assert_same_as_whole_plane(label(prediction, size=size, channel_offset=1), prediction, size, 1)


@given(
    st.sampled_from(["pixels", "queries"]),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(0, 20_000),
    st.integers(),
)
@settings(max_examples=60, deadline=None)
def test_the_size_of_the_tiles_cannot_be_seen(kind: str, width: int, height: int, tile_bytes: int, seed: int) -> None:
    prediction = random_prediction(kind, seed % 2**31)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "TILE_BYTES", tile_bytes)
        mask = label(prediction, size=(width, height), channel_offset=1)
    assert_same_as_whole_plane(mask, prediction, (width, height), 1)


def test_no_tile_holds_more_than_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    sample = postprocess._sample  # noqa: SLF001

    def spy(planes: torch.Tensor, rows: range, columns: range, size: Size) -> torch.Tensor:
        tile = sample(planes, rows, columns, size)
        seen.append(tile.numel() * 4)
        return tile

    monkeypatch.setattr(postprocess, "_sample", spy)
    monkeypatch.setattr(postprocess, "TILE_BYTES", 200_000)
    label(random_prediction("queries", 0), size=(5000, 40), channel_offset=0)
    assert len(seen) > 10
    assert max(seen) <= 200_000


@pytest.mark.parametrize(("offset", "expected"), [(0, 2), (1, 3)])
def test_the_id_is_the_channel_plus_the_offset_of_its_mode(offset: int, expected: int) -> None:
    logits = torch.zeros((4, 3, 3))
    logits[2] = 5
    mask = label(PixelLogits(logits), size=(8, 8), channel_offset=offset)
    assert mask.tolist() == [[expected] * 8] * 8


def test_the_last_class_column_means_no_object_and_never_wins() -> None:
    masks = torch.full((2, 4, 4), 9.0)
    classes = torch.tensor([[0.0, 0.0, 0.0, 50.0], [0.0, 3.0, 0.0, 0.0]])
    assert np.unique(label(QueryLogits(masks, classes), size=(4, 4), channel_offset=1)).tolist() == [2]


def test_queries_of_one_class_add_up() -> None:
    # Two lukewarm queries for class 1 outweigh one warm query for class 0.
    masks = torch.tensor([[[1.0]], [[0.5]], [[0.5]]])
    classes = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.0]])
    assert label(QueryLogits(masks, classes), size=(1, 1), channel_offset=0).tolist() == [[1]]


def test_all_150_classes_of_ade20k_fit_their_ids() -> None:
    logits = torch.eye(150)[:, None, :] * 10
    assert label(PixelLogits(logits), size=(150, 1), channel_offset=1).tolist() == [list(range(1, 151))]


def test_more_channels_than_eight_bits_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="8 bits"):
        label(PixelLogits(torch.zeros((256, 1, 1))), size=(1, 1), channel_offset=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_output_is_computed_in_single(dtype: torch.dtype) -> None:
    prediction = random_prediction("pixels", 3)
    assert isinstance(prediction, PixelLogits)
    rounded = PixelLogits(prediction.logits.to(dtype))
    assert_same_as_whole_plane(label(rounded, size=(30, 20), channel_offset=0), rounded, (30, 20), 0)


def test_a_checkpoint_can_stop_between_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "TILE_BYTES", 10_000)
    calls = 0

    def stop_at_third() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(random_prediction("pixels", 0), size=(100, 100), channel_offset=0, checkpoint=stop_at_third)
    assert calls == 3
