"""Sampling of multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1), without its matrices.

Positions are float32 in the cells of each level, 0 being the middle of the first one: in half precision they would be
off by up to half a cell. There are two ways to the same sum, because reading whole rows is several times faster than
grid_sample on a CPU, and grid_sample is what accelerators have a kernel for.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from shared.inference.linear import rows_at_once


@dataclass(frozen=True)
class Levels:
    """Maps of several sizes, flattened and concatenated; `references` are the positions of all tokens on all of them.

    `sizes` are (height, width) and the references float32 (tokens, levels, 2), x first.
    """

    sizes: tuple[tuple[int, int], ...]
    references: torch.Tensor

    @property
    def counts(self) -> list[int]:
        """The tokens of each level."""
        return [height * width for height, width in self.sizes]


def plan_levels(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Levels:
    """The levels of these (height, width): the middle of every token, measured in the cells of every level."""
    middles = []
    for height, width in sizes:
        down = (torch.arange(height, dtype=torch.float64) + 0.5) / height
        across = (torch.arange(width, dtype=torch.float64) + 0.5) / width
        middles.append(torch.stack([across.expand(height, -1), down[:, None].expand(-1, width)], dim=-1).flatten(0, 1))
    extents = torch.tensor([(width, height) for height, width in sizes], dtype=torch.float64)
    references = torch.cat(middles)[:, None, :] * extents - 0.5
    return Levels(sizes, references.float().to(device))


def sample(
    values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, levels: Levels, tokens: slice
) -> torch.Tensor:
    """For the queries `tokens`, the weighted sum of values at their reference points plus offsets, in float32.

    `values` (batch, all tokens, heads, channels); `offsets` in cells (batch, queries, heads, levels, points, 2), x
    first; `weights` (batch, queries, heads, levels, points). Bilinear, zero outside a level. Returns (batch, queries,
    heads × channels).
    """
    positions = offsets.float() + levels.references[tokens, None, :, None, :]
    if values.device.type == "cpu":
        return sample_rows(values, positions, weights, levels)
    return sample_grids(values, positions, weights, levels)


def sample_grids(values: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor, levels: Levels) -> torch.Tensor:
    """As `sample`, level by level with grid_sample; `positions` take the place of references and offsets."""
    batch, queries, heads = positions.shape[:3]
    total = values.new_zeros((batch * heads, values.shape[3], queries))
    for number, (level, (height, width)) in enumerate(
        zip(torch.split(values, levels.counts, dim=1), levels.sizes, strict=True)
    ):
        planes = level.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        extent = positions.new_tensor((width, height))
        grid = ((2 * positions[:, :, :, number] + 1) / extent - 1).transpose(1, 2).flatten(0, 1)
        samples = functional.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total += (samples * weights[:, :, :, number].transpose(1, 2).flatten(0, 1)[:, None]).sum(dim=-1)
    return total.view(batch, -1, queries).transpose(1, 2)


def sample_rows(values: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor, levels: Levels) -> torch.Tensor:
    """As `sample_grids`, with every bilinear sample as four weighted rows of one embedding bag per query and head."""
    batch, _, heads, channels = values.shape
    rows, starts = _surround(values, levels)
    extents = positions.new_tensor([(width, height) for height, width in levels.sizes])[:, None]
    strides = torch.tensor([width + 2 for _, width in levels.sizes], dtype=torch.int32)[:, None]
    firsts = starts[:, None] * heads + torch.arange(heads, dtype=torch.int32)[:, None, None]
    corners = torch.stack([torch.zeros_like(strides), strides.new_ones(strides.shape), strides, strides + 1], dim=-1)
    mixed = []
    step = rows_at_once(values.device, 16 * weights[0, 0].numel())
    for image in range(batch):
        for query in range(0, positions.shape[1], step):
            # A sample further out than one cell is a sample of the border of zeros.
            place = positions[image, query : query + step].clamp(min=-1).minimum(extents)
            cell = place.floor().minimum(extents - 1)
            x, y = (place - cell).unbind(-1)
            column, row = cell.int().unbind(-1)
            index = ((row + 1) * strides + column + 1).mul_(heads).add_(firsts)[..., None] + corners * heads
            lower = weights[image, query : query + step] * y
            upper = weights[image, query : query + step] - lower
            share = torch.stack([upper - upper * x, upper * x, lower - lower * x, lower * x], dim=-1)
            bags = functional.embedding_bag(
                index.flatten(2).flatten(0, 1),
                rows[image],
                per_sample_weights=share.flatten(2).flatten(0, 1),
                mode="sum",
            )
            mixed.append(bags.view(-1, heads * channels))
    return torch.cat(mixed).view(batch, -1, heads * channels)


def _surround(values: torch.Tensor, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """Every level within a border of zeros, as rows (batch, cells × heads, channels), and the first cell of each."""
    batch, _, heads, channels = values.shape
    counts = [(height + 2) * (width + 2) for height, width in levels.sizes]
    rows = values.new_zeros((batch, sum(counts), heads * channels))
    starts = [sum(counts[:number]) for number in range(len(counts))]
    for level, start, count, (height, width) in zip(
        torch.split(values.flatten(2), levels.counts, dim=1), starts, counts, levels.sizes, strict=True
    ):
        bordered = rows[:, start : start + count].view(batch, height + 2, width + 2, -1)
        bordered[:, 1:-1, 1:-1] = level.view(batch, height, width, -1)
    return rows.view(batch, -1, channels), torch.tensor(starts, dtype=torch.int32)
