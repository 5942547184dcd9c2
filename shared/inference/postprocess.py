"""From a model's raw output to class ids at the image's own resolution.

Whole planes at full size would take gigabytes (150 classes of a 4K frame: 5 GB); none of the ways here holds them. All
of them give the labels of the whole computation: by cells on a CPU, by tiles elsewhere.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shared.inference.blend import Sheet, blend
from shared.inference.cells import label_cells
from shared.inference.passes import Pass
from shared.inference.scores import PixelScores, QueryScores, Scores
from shared.inference.tiles import label_tiles


@dataclass(frozen=True)
class PixelLogits:
    """What a per-pixel classifier gives: (channels, h, w)."""

    logits: torch.Tensor


@dataclass(frozen=True)
class QueryLogits:
    """What a mask classifier gives: masks (queries, h, w) and classes (queries, channels + 1), "no object" last."""

    masks: torch.Tensor
    classes: torch.Tensor


@dataclass(frozen=True)
class Labels:
    """Class ids and, where asked for, how sure they are: uint8 (height, width) each.

    Confidence is 255 × the winner's part of the whole, rounded: of a per-pixel classifier its softmax probability, of a
    mask classifier its share of the sum of all channels' scores.
    """

    mask: NDArray[np.uint8]
    confidence: NDArray[np.uint8] | None = None


def proceed() -> None:
    """The checkpoint of a caller who never wants to stop."""


@torch.inference_mode()
def label(
    prediction: PixelLogits | QueryLogits,
    *,
    size: tuple[int, int],
    channel_offset: int,
    confidence: bool = False,
    unlabeled_below: float = 0.0,
    checkpoint: Callable[[], None] = proceed,
) -> Labels:
    """Label an image of `size` (width, height); id = channel + `channel_offset`.

    Per-pixel logits are resized bilinearly (align_corners=False) and the largest channel wins. Mask logits are resized
    likewise, straight to `size`; a channel's score is then the sum over queries of sigmoid(mask) × softmax(class)
    without "no object" (the semantic inference of Mask2Former, arXiv 2112.01527, section 3). The model's input must
    have covered the whole image without padding. Pixels whose confidence / 255 is less than `unlabeled_below` get id 0.
    `checkpoint` is called between the parts of the work and may raise to stop. Raises ValueError for ids beyond 8 bits
    and an `unlabeled_below` outside 0 to 1.
    """
    planes, weights = _planes_and_weights(prediction, channel_offset)
    wanted = confidence or unlabeled_below > 0
    winners, shares = _winners(planes, weights, size, confidence=wanted, checkpoint=checkpoint)
    return _finish(winners, shares, channel_offset, confidence, unlabeled_below)


@torch.inference_mode()
def combine(
    predictions: Iterable[tuple[Pass, PixelLogits | QueryLogits]],
    *,
    size: tuple[int, int],
    channel_offset: int,
    confidence: bool = False,
    unlabeled_below: float = 0.0,
    checkpoint: Callable[[], None] = proceed,
) -> Labels:
    """As `label`, from several passes ordered by the top of their areas: the scores of all that show a pixel count.

    Per-pixel logits are turned into softmax probabilities before they are added (see blend).
    """
    winners, shares = blend(
        (Sheet(*_planes_and_weights(prediction, channel_offset), shown) for shown, prediction in predictions),
        size=size,
        confidence=confidence or unlabeled_below > 0,
        checkpoint=checkpoint,
    )
    on_cpu = None if shares is None else shares.cpu().numpy()
    return _finish(winners.cpu().numpy(), on_cpu, channel_offset, confidence, unlabeled_below)


def _planes_and_weights(
    prediction: PixelLogits | QueryLogits, channel_offset: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(prediction, PixelLogits):
        planes, weights = prediction.logits, None
        count = planes.shape[0]
    else:
        planes, weights = prediction.masks, prediction.classes.float().softmax(dim=-1)[:, :-1].contiguous()
        count = weights.shape[1]
    if count + channel_offset > 256:
        raise ValueError(f"{count} channels from id {channel_offset} do not fit the 8 bits of a mask")
    return planes, weights


def _finish(
    winners: NDArray[np.uint8],
    shares: NDArray[np.uint8] | None,
    channel_offset: int,
    confidence: bool,
    unlabeled_below: float,
) -> Labels:
    if not 0 <= unlabeled_below <= 1:
        raise ValueError(f"unlabeled_below {unlabeled_below} is not between 0 and 1")
    mask = winners
    mask += np.uint8(channel_offset)
    if shares is not None and unlabeled_below > 0:
        mask[shares < unlabeled_below * 255] = 0
    return Labels(mask=mask, confidence=shares if confidence else None)


def _winners(
    planes: torch.Tensor,
    weights: torch.Tensor | None,
    size: tuple[int, int],
    *,
    confidence: bool,
    checkpoint: Callable[[], None],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """The winning channels and their confidence, by the best way this device has."""
    if planes.device.type == "cpu":
        scores: Scores = (
            PixelScores.of(planes.shape[0], confidence=confidence)
            if weights is None
            else QueryScores.of(weights, confidence=confidence)
        )
        return label_cells(planes, scores, size=size, checkpoint=checkpoint)
    # The fused kernel of triton_masks waits for its first run on a real GPU (tests/gpu) before jobs depend on it.
    channels, shares = label_tiles(planes, weights, size=size, confidence=confidence, checkpoint=checkpoint)
    return channels.cpu().numpy(), None if shares is None else shares.cpu().numpy()
