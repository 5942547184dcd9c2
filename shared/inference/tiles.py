"""Labels by tiles, on any device: every pixel is computed from every value, a tile of the image at a time.

Every tile samples the low-resolution planes at the exact bilinear coordinates of the whole image, so the tiling cannot
be seen in the result. It needs nothing but torch; cells (on a CPU) and triton_masks (on CUDA) are the faster ways.
"""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from shared.inference.sampling import axis

TILE_BYTES = 64 * 2**20
"""About how much the planes of one tile may take."""


def label_tiles(
    planes: torch.Tensor,
    weights: torch.Tensor | None,
    *,
    size: tuple[int, int],
    confidence: bool,
    checkpoint: Callable[[], None],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The winning channel and, if wanted, its confidence, uint8 (height, width) each, from `planes` (V, h, w).

    `weights` (queries, channels) make `planes` mask logits; without them they are logits of channels. `size` is (width,
    height). `checkpoint` is called before every tile and may raise to stop.
    """
    width, height = size
    planes = planes.float()
    channels = torch.empty((height, width), dtype=torch.uint8, device=planes.device)
    shares = torch.empty_like(channels) if confidence else None
    floats_per_pixel = 2 * planes.shape[0] + (0 if weights is None else weights.shape[1])
    for rows, columns in _tiles(width, height, TILE_BYTES // (4 * floats_per_pixel)):
        checkpoint()
        scores = _sample(planes, rows, columns, size)
        if weights is not None:
            scores = torch.tensordot(weights.T, scores.sigmoid_(), dims=1)
        best, winner = scores.max(dim=0)
        area = (slice(rows.start, rows.stop), slice(columns.start, columns.stop))
        channels[area] = winner
        if shares is not None:
            share = (best - scores.logsumexp(dim=0)).exp() if weights is None else best / scores.sum(dim=0)
            shares[area] = (share.nan_to_num() * 255).round()
    return channels, shares


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
    positions: range, length: int, samples: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two samples of each position of one axis and the weight of the second."""
    whole, part = axis(length, samples), slice(positions.start, positions.stop)
    return (
        torch.from_numpy(whole.lower[part]).to(device),
        torch.from_numpy(whole.upper[part]).to(device),
        torch.from_numpy(whole.weight[part]).to(device),
    )
