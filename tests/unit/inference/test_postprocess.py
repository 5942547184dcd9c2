"""From raw output to class ids: every way against the whole planes, confidence, offsets, and stopping in between."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional

from bench.logits import random_pixels, random_queries, structured_pixels, structured_queries
from shared.inference import cells, tiles
from shared.inference.cells import label_cells
from shared.inference.postprocess import PixelLogits, QueryLogits, label
from shared.inference.sampling import MAX_RUN, Axis, axis
from shared.inference.scores import QueryScores
from shared.inference.tiles import label_tiles

Size = tuple[int, int]
Prediction = PixelLogits | QueryLogits
SIZES = [(56, 36), (100, 71), (14, 9), (7, 5), (1, 1), (1, 200), (300, 1), (223, 145)]


def whole_plane_scores(prediction: Prediction, size: Size) -> torch.Tensor:
    """The textbook computation in double precision, every plane at full size: (channels, height, width)."""
    width, height = size
    planes = prediction.logits if isinstance(prediction, PixelLogits) else prediction.masks
    resized = functional.interpolate(planes[None].double(), size=(height, width), mode="bilinear")[0]
    if isinstance(prediction, PixelLogits):
        return resized
    chances = prediction.classes.double().softmax(dim=-1)[:, :-1]
    return torch.einsum("qc,qhw->chw", chances, resized.sigmoid())


def assert_same_as_whole_plane(
    mask: NDArray[np.uint8], prediction: Prediction, size: Size, *, offset: int = 0, tie: float = 1e-5
) -> None:
    """Every pixel has the winner, except where the runner-up is behind by less than `tie` of the best score."""
    scores = whole_plane_scores(prediction, size)
    assert mask.shape == (size[1], size[0])
    assert mask.dtype == np.uint8
    chosen = scores.gather(0, torch.from_numpy(mask.astype(np.int64))[None] - offset)[0]
    best = scores.max(dim=0).values
    scale = planes_of(prediction).abs().max().item() if isinstance(prediction, PixelLogits) else best
    assert ((best - chosen) <= tie * torch.as_tensor(scale).clamp(min=1e-6)).all()


def planes_of(prediction: Prediction) -> torch.Tensor:
    return prediction.logits if isinstance(prediction, PixelLogits) else prediction.masks


def by_tiles(prediction: Prediction, size: Size) -> NDArray[np.uint8]:
    weights = None
    if isinstance(prediction, QueryLogits):
        weights = prediction.classes.float().softmax(dim=-1)[:, :-1]
    channels, _ = label_tiles(planes_of(prediction), weights, size=size, confidence=False, checkpoint=lambda: None)
    return channels.numpy()


def by_cells(prediction: Prediction, size: Size) -> NDArray[np.uint8]:
    return label(prediction, size=size, channel_offset=0).mask


def random_prediction(kind: str, seed: int = 0, *, height: int = 9, width: int = 14) -> Prediction:
    if kind == "pixels":
        return random_pixels(height, width, channels=12, seed=seed)
    return random_queries(height, width, queries=12, channels=8, seed=seed)


def structured_prediction(kind: str, seed: int = 0, *, height: int = 24, width: int = 30) -> Prediction:
    if kind == "pixels":
        return structured_pixels(height, width, channels=12, regions=6, seed=seed)
    return structured_queries(height, width, queries=20, active=6, channels=9, seed=seed)


@pytest.mark.parametrize("way", [by_cells, by_tiles])
@pytest.mark.parametrize("make", [random_prediction, structured_prediction])
@pytest.mark.parametrize("kind", ["pixels", "queries"])
@pytest.mark.parametrize("size", SIZES)
def test_every_way_gives_what_the_whole_plane_gives(
    way: Callable[[Prediction, Size], NDArray[np.uint8]],
    make: Callable[[str, int], Prediction],
    kind: str,
    size: Size,
) -> None:
    prediction = make(kind, size[0])
    assert_same_as_whole_plane(way(prediction, size), prediction, size)


@given(
    make=st.sampled_from([random_prediction, structured_prediction]),
    kind=st.sampled_from(["pixels", "queries"]),
    samples=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    seed=st.integers(0, 2**31),
    band_bytes=st.sampled_from([1, 20_000, 2**21]),
    chunk_bytes=st.sampled_from([1, 20_000, 2**20]),
)
@settings(max_examples=120, deadline=None)
def test_sizes_and_limits_cannot_be_seen(
    make: Callable[..., Prediction],
    kind: str,
    samples: tuple[int, int],
    size: Size,
    seed: int,
    band_bytes: int,
    chunk_bytes: int,
) -> None:
    prediction = make(kind, seed, height=samples[0], width=samples[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "BAND_BYTES", band_bytes)
        patch.setattr(cells, "CHUNK_BYTES", chunk_bytes)
        assert_same_as_whole_plane(by_cells(prediction, size), prediction, size)


@given(
    kind=st.sampled_from(["pixels", "queries"]),
    scale=st.sampled_from([0.0, 1e-6, 1e-3, 1e2, 1e4]),
    levels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_ties_near_ties_and_steps_are_right_too(kind: str, scale: float, levels: int, size: Size, seed: int) -> None:
    """Few distinct values: planes equal in places, constant ones, tiny differences, and cliffs."""
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(levels, (6, 8, 11), generator=generator).float() * scale
    planes[1] = planes[0]
    classes = torch.randint(2, (6, 6), generator=generator).float()
    prediction = PixelLogits(planes) if kind == "pixels" else QueryLogits(planes, classes)
    assert_same_as_whole_plane(by_cells(prediction, size), prediction, size)


def test_the_bounds_decide_most_of_a_structured_image(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    judge = QueryScores.judge_points

    def count(scores: QueryScores, values: torch.Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        computed.append(len(values))
        return judge(scores, values)

    monkeypatch.setattr(QueryScores, "judge_points", count)
    prediction = structured_queries(128, 128, active=10)
    assert_same_as_whole_plane(by_cells(prediction, (512, 512)), prediction, (512, 512))
    assert 0 < sum(computed) < 0.2 * 512 * 512


def test_a_nan_spoils_its_own_neighbourhood_only() -> None:
    prediction = structured_queries(16, 16, queries=20, active=4, channels=5)
    clean = by_cells(prediction, (64, 64))
    prediction.masks[0, 0, 0] = float("nan")
    assert (by_cells(prediction, (64, 64))[8:, 8:] == clean[8:, 8:]).all()


@pytest.mark.parametrize(("length", "samples"), [(1, 1), (1, 9), (9, 1), (100, 7), (7, 100), (2160, 192), (5, 5)])
def test_runs_lie_between_the_same_two_samples(length: int, samples: int) -> None:
    line = axis(length, samples)
    assert line.starts[0] == 0
    assert line.starts[-1] == length
    for start, end in zip(line.starts[:-1], line.starts[1:], strict=True):
        assert 0 < end - start <= MAX_RUN
        assert len(set(line.lower[start:end])) == 1
    ramp = functional.interpolate(torch.arange(samples).double()[None, None], size=length, mode="linear")[0, 0]
    mine = (1 - line.weight) * line.lower + line.weight * line.upper
    assert np.abs(mine - ramp.numpy()).max() < 1e-5


def test_no_tile_holds_more_than_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    sample = tiles.sample

    def spy(planes: torch.Tensor, down: Axis, rows: range, across: Axis | None, columns: range) -> torch.Tensor:
        tile = sample(planes, down, rows, across, columns)
        seen.append(tile.numel() * 4)
        return tile

    monkeypatch.setattr(tiles, "sample", spy)
    monkeypatch.setattr(tiles, "TILE_BYTES", 200_000)
    prediction = random_prediction("queries")
    assert_same_as_whole_plane(by_tiles(prediction, (5000, 40)), prediction, (5000, 40))
    assert len(seen) > 10
    assert max(seen) <= 200_000


def expected_confidence(prediction: Prediction, size: Size) -> NDArray[np.float64]:
    scores = whole_plane_scores(prediction, size)
    shares = scores.softmax(dim=0) if isinstance(prediction, PixelLogits) else scores / scores.sum(dim=0)
    return np.asarray(shares.max(dim=0).values.numpy() * 255)


@pytest.mark.parametrize("make", [random_prediction, structured_prediction])
@pytest.mark.parametrize("kind", ["pixels", "queries"])
@pytest.mark.parametrize("size", SIZES)
def test_confidence_is_the_share_of_the_winner(make: Callable[[str], Prediction], kind: str, size: Size) -> None:
    prediction = make(kind)
    labels = label(prediction, size=size, channel_offset=0, confidence=True)
    assert labels.confidence is not None
    assert labels.confidence.dtype == np.uint8
    # Half a step of rounding, and a little for single precision at the edge of a step.
    assert np.abs(labels.confidence - expected_confidence(prediction, size)).max() <= 0.51
    assert_same_as_whole_plane(labels.mask, prediction, size)
    weights = None
    if isinstance(prediction, QueryLogits):
        weights = prediction.classes.softmax(dim=-1)[:, :-1]
    _, tiled = label_tiles(planes_of(prediction), weights, size=size, confidence=True, checkpoint=lambda: None)
    assert tiled is not None
    assert np.abs(tiled.numpy() - expected_confidence(prediction, size)).max() <= 0.51


def test_confidence_is_not_computed_unless_asked_for() -> None:
    assert label(random_prediction("queries"), size=(20, 20), channel_offset=0).confidence is None


@pytest.mark.parametrize("kind", ["pixels", "queries"])
def test_pixels_below_the_threshold_are_unlabeled(kind: str) -> None:
    prediction = structured_prediction(kind)
    plain = label(prediction, size=(120, 90), channel_offset=1, confidence=True)
    assert plain.confidence is not None
    labels = label(prediction, size=(120, 90), channel_offset=1, unlabeled_below=0.6)
    assert labels.confidence is None
    assert 0 < (labels.mask == 0).mean() < 1
    assert (labels.mask == np.where(plain.confidence < 0.6 * 255, 0, plain.mask)).all()


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="unlabeled_below"):
        label(random_prediction("pixels"), size=(4, 4), channel_offset=0, unlabeled_below=threshold)


@pytest.mark.parametrize(("offset", "expected"), [(0, 2), (1, 3)])
def test_the_id_is_the_channel_plus_the_offset_of_its_mode(offset: int, expected: int) -> None:
    logits = torch.zeros((4, 3, 3))
    logits[2] = 5
    mask = label(PixelLogits(logits), size=(8, 8), channel_offset=offset).mask
    assert mask.tolist() == [[expected] * 8] * 8


def test_the_last_class_column_means_no_object_and_never_wins() -> None:
    masks = torch.full((2, 4, 4), 9.0)
    classes = torch.tensor([[0.0, 0.0, 0.0, 50.0], [0.0, 3.0, 0.0, 0.0]])
    assert np.unique(label(QueryLogits(masks, classes), size=(4, 4), channel_offset=1).mask).tolist() == [2]


def test_queries_of_one_class_add_up() -> None:
    # Two lukewarm queries for class 1 outweigh one warm query for class 0.
    masks = torch.tensor([[[1.0]], [[0.5]], [[0.5]]])
    classes = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.0]])
    assert label(QueryLogits(masks, classes), size=(1, 1), channel_offset=0).mask.tolist() == [[1]]


def test_all_150_classes_of_ade20k_fit_their_ids() -> None:
    logits = torch.eye(150)[:, None, :] * 10
    assert label(PixelLogits(logits), size=(150, 1), channel_offset=1).mask.tolist() == [list(range(1, 151))]


def test_more_channels_than_eight_bits_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="8 bits"):
        label(PixelLogits(torch.zeros((256, 1, 1))), size=(1, 1), channel_offset=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["pixels", "queries"])
def test_half_precision_output_is_computed_in_single(kind: str, dtype: torch.dtype) -> None:
    prediction = random_prediction(kind, 3)
    if isinstance(prediction, PixelLogits):
        prediction = PixelLogits(prediction.logits.to(dtype))
    else:
        prediction = QueryLogits(prediction.masks.to(dtype), prediction.classes.to(dtype))
    assert_same_as_whole_plane(by_cells(prediction, (30, 20)), prediction, (30, 20))


def test_a_checkpoint_can_stop_between_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "BAND_BYTES", 1)
    calls = 0

    def stop_at_third() -> None:
        nonlocal calls
        calls += 1
        assert threading.current_thread() is threading.main_thread()
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(random_prediction("pixels", height=40), size=(100, 100), channel_offset=0, checkpoint=stop_at_third)
    assert calls == 3


def test_a_failure_in_a_band_is_raised_and_the_threads_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()

    def fail(scores: QueryScores, low: torch.Tensor, high: torch.Tensor) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(QueryScores, "judge_range", fail)
    with pytest.raises(MemoryError, match="no room"):
        by_cells(random_prediction("queries"), (30, 30))
    assert torch.get_num_threads() == threads
    seen: list[int] = []
    newcomer = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    newcomer.start()
    newcomer.join()
    assert seen == [threads]


def test_cells_and_tiles_agree_at_full_scale() -> None:
    prediction = structured_queries(96, 172)
    scores = QueryScores.of(prediction.classes.softmax(dim=-1)[:, :-1], confidence=False)
    channels, _ = label_cells(prediction.masks, scores, size=(1920, 1080), checkpoint=lambda: None)
    assert (channels == by_tiles(prediction, (1920, 1080))).mean() >= 0.99999
