"""Masks on CUDA: the fused kernel and the tiles give the labels that the CPU gives."""

import numpy as np
import pytest
import torch

from bench.logits import random_pixels, random_queries, structured_pixels, structured_queries
from shared.inference.postprocess import Labels, PixelLogits, QueryLogits, label
from shared.inference.tiles import label_tiles

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

Prediction = PixelLogits | QueryLogits
CASES: dict[str, tuple[Prediction, tuple[int, int]]] = {
    "structured queries": (structured_queries(96, 172), (1920, 1080)),
    "random queries": (random_queries(64, 64), (300, 200)),
    "few queries": (random_queries(5, 7, queries=3, channels=2), (131, 77)),
    "structured pixels": (structured_pixels(128, 128, channels=150), (1000, 700)),
    "random pixels": (random_pixels(64, 64, channels=21), (512, 512)),
    "one sample": (random_queries(1, 1), (65, 3)),
}


def to_cuda(prediction: Prediction) -> Prediction:
    if isinstance(prediction, PixelLogits):
        return PixelLogits(prediction.logits.cuda())
    return QueryLogits(prediction.masks.cuda(), prediction.classes.cuda())


def assert_agree(labels: Labels, expected: Labels) -> None:
    assert (labels.mask == expected.mask).mean() >= 0.99999
    assert labels.confidence is not None
    assert expected.confidence is not None
    assert np.abs(labels.confidence.astype(int) - expected.confidence.astype(int)).max() <= 1


@pytest.mark.parametrize("case", CASES)
def test_the_label_of_every_pixel_is_that_of_the_cpu(case: str) -> None:
    prediction, size = CASES[case]
    expected = label(prediction, size=size, channel_offset=1, confidence=True)
    assert_agree(label(to_cuda(prediction), size=size, channel_offset=1, confidence=True), expected)


@pytest.mark.parametrize("case", CASES)
def test_tiles_on_cuda_agree_too(case: str) -> None:
    prediction, size = CASES[case]
    expected = label(prediction, size=size, channel_offset=0, confidence=True)
    moved = to_cuda(prediction)
    planes, weights = (
        (moved.logits, None)
        if isinstance(moved, PixelLogits)
        else (moved.masks, moved.classes.softmax(dim=-1)[:, :-1].contiguous())
    )
    channels, shares = label_tiles(planes, weights, size=size, confidence=True, checkpoint=lambda: None)
    assert shares is not None
    assert_agree(Labels(channels.cpu().numpy(), shares.cpu().numpy()), expected)


def test_a_4k_mask_takes_little_more_memory_than_its_input() -> None:
    prediction = to_cuda(structured_queries(192, 344))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    label(prediction, size=(3840, 2160), channel_offset=1)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
