"""Labels by tiles, on any device: every pixel is computed from every value, a tile of the image at a time.

Every tile samples the low-resolution planes at the exact bilinear coordinates of the whole image, so the tiling cannot
be seen in the result. It needs nothing but torch; cells (on a CPU) and triton_masks (on CUDA) are the faster ways.
"""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from shared.inference.sampling import Axis, axis

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
    down, across = axis(height, planes.shape[1]), axis(width, planes.shape[2])
    for rows, columns in _tiles(width, height, TILE_BYTES // (4 * floats_per_pixel)):
        checkpoint()
        # Whole rows of pixels are resized as planes are: the same interpolation in a quarter of the time.
        scores = sample(planes, down, rows, None if len(columns) == width else across, columns)
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


def sample(planes: torch.Tensor, down: Axis, rows: range, across: Axis | None, columns: range) -> torch.Tensor:
    """The values of `planes` (V, h, w) where `rows` and `columns` cross: (V, rows, columns).

    Without `across`, `columns` are all there are and the planes reach exactly over them.
    """
    upper, lower, weight = _taps(down, rows, planes.device)
    lines = torch.lerp(planes[:, upper], planes[:, lower], weight[:, None])
    if across is None:
        return functional.interpolate(lines[None], size=(len(rows), len(columns)), mode="bilinear")[0]
    left, right, weight = _taps(across, columns, planes.device)
    return torch.lerp(lines[:, :, left], lines[:, :, right], weight)


def _taps(line: Axis, positions: range, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two samples of each position of one axis and the weight of the second."""
    part = slice(positions.start, positions.stop)
    return (
        torch.from_numpy(line.lower[part]).to(device),
        torch.from_numpy(line.upper[part]).to(device),
        torch.from_numpy(line.weight[part]).to(device),
    )
