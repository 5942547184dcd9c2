"""From a model's raw output to class ids at the image's own resolution.

Whole planes at full size would take gigabytes (150 classes of a 4K frame: 5 GB), so the output is computed tile by
tile. Every tile samples the low-resolution planes at the exact bilinear coordinates of the whole image, so the tiling
cannot be seen in the result.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

TILE_BYTES = 64 * 2**20
"""About how much the planes of one tile may take."""


@dataclass(frozen=True)
class PixelLogits:
    """What a per-pixel classifier gives: (channels, h, w)."""

    logits: torch.Tensor


@dataclass(frozen=True)
class QueryLogits:
    """What a mask classifier gives: masks (queries, h, w) and classes (queries, channels + 1), "no object" last."""

    masks: torch.Tensor
    classes: torch.Tensor


def proceed() -> None:
    """The checkpoint of a caller who never wants to stop."""


def label(
    prediction: PixelLogits | QueryLogits,
    *,
    size: tuple[int, int],
    channel_offset: int,
    checkpoint: Callable[[], None] = proceed,
) -> NDArray[np.uint8]:
    """The class ids of an image of `size` (width, height), uint8 (height, width); id = channel + `channel_offset`.

    Per-pixel logits are resized bilinearly (align_corners=False) and the largest channel wins. Mask logits are resized
    likewise, straight to `size`; a channel's score is then the sum over queries of sigmoid(mask) × softmax(class)
    without "no object" (the semantic inference of Mask2Former, arXiv 2112.01527, section 3). The model's input must
    have covered the whole image without padding. `checkpoint` is called before every tile and may raise to stop.
    """
    if isinstance(prediction, PixelLogits):
        planes = prediction.logits.float()
        channels = planes.shape[0]
        weights = None
    else:
        planes = prediction.masks.float()
        weights = prediction.classes.float().softmax(dim=-1)[:, :-1].T.contiguous()
        channels = weights.shape[0]
    if channels + channel_offset > 256:
        raise ValueError(f"{channels} channels from id {channel_offset} do not fit the 8 bits of a mask")
    width, height = size
    labels = torch.empty((height, width), dtype=torch.uint8, device=planes.device)
    floats_per_pixel = 2 * planes.shape[0] + (0 if weights is None else channels)
    for rows, columns in _tiles(width, height, TILE_BYTES // (4 * floats_per_pixel)):
        checkpoint()
        tile = _sample(planes, rows, columns, size)
        if weights is not None:
            tile = torch.tensordot(weights, tile.sigmoid_(), dims=1)
        labels[rows.start : rows.stop, columns.start : columns.stop] = tile.max(dim=0).indices + channel_offset
    return labels.cpu().numpy()


def _tiles(width: int, height: int, pixels: int) -> Iterator[tuple[range, range]]:
    """Cover the image with tiles of at most about `pixels`: bands of rows, or pieces of a row too long for one."""
    columns_per_tile = max(1, min(width, pixels))
    rows_per_tile = max(1, pixels // columns_per_tile)
    for top in range(0, height, rows_per_tile):
        rows = range(top, min(top + rows_per_tile, height))
        for left in range(0, width, columns_per_tile):
            yield rows, range(left, min(left + columns_per_tile, width))


def _sample(planes: torch.Tensor, rows: range, columns: range, size: tuple[int, int]) -> torch.Tensor:
    """The part of `planes` resized to `size` that lies in `rows` and `columns`: (planes, rows, columns)."""
    width, height = size
    upper, lower, down = _taps(rows, height, planes.shape[1], planes.device)
    lines = torch.lerp(planes[:, upper], planes[:, lower], down[:, None])
    if len(columns) == width:
        # Rows stay as they are (their scale is 1), so this is the same interpolation in a quarter of the time.
        return functional.interpolate(lines[None], size=(len(rows), width), mode="bilinear")[0]
    left, right, across = _taps(columns, width, planes.shape[2], planes.device)
    return torch.lerp(lines[:, :, left], lines[:, :, right], across)


def _taps(
    positions: range, length: int, source_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two source indices and the weight of the second for each output position of one axis.

    Bilinear with align_corners=False: source = (position + 0.5) × source_length / length - 0.5, clamped to the edge.
    """
    # Double precision: single would misplace samples by hundredths of a cell in the longest images.
    exact = (torch.arange(positions.start, positions.stop, dtype=torch.float64) + 0.5) * (source_length / length) - 0.5
    exact = exact.clamp(0, source_length - 1)
    first = exact.floor().long()
    second = (first + 1).clamp(max=source_length - 1)
    return first.to(device), second.to(device), (exact - first).float().to(device)
