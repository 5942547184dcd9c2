"""Which tokens of a feature map share a window of Swin's attention, and in which order to keep them in memory.

Swin (arXiv 2103.14030, section 3.2) pads a map to whole windows, rolls every second layer by half a window and masks
what the roll brought together. Nothing but attention looks at a token's neighbours, so tokens are kept here in the
order of the windows from one layer to the next: one gather per layer takes the place of pad, roll, partition, reverse,
roll and crop, and padding exists inside the attention only. A plan depends on shapes alone, never on weights.
"""

from dataclasses import dataclass

import torch

from shared.inference.linear import rows_at_once

PLAIN = 0
"""The kind of a window in which every token may attend to every other one."""


@dataclass(frozen=True)
class Chunk:
    """Windows of one kind that are worked on together.

    `tokens` are their rows in the order of the layer. Where windows reach over the edge of the map, `slots`
    (windows × area) gives each place in a window its row within the chunk, one past the last for padding, and `real`
    the places that are not padding. `kind` chooses the mask: bit 0 for the last column of windows, bit 1 for the last
    row.
    """

    tokens: slice
    kind: int
    slots: torch.Tensor | None
    real: torch.Tensor | None


@dataclass(frozen=True)
class LayerPlan:
    """One layer: `order` holds the raster position of each token in the order of the layer's windows."""

    order: torch.Tensor
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class StagePlan:
    """A stage of Swin at one size: gathers between orders, `int32` (batch × height × width).

    `enter` leads from raster order to that of the unshifted windows, `shift` and `unshift` between the two kinds of
    layers, `leave` from the unshifted (0) or shifted (1) order back to raster order.
    """

    batch: int
    height: int
    width: int
    layers: tuple[LayerPlan, LayerPlan]
    enter: torch.Tensor
    shift: torch.Tensor
    unshift: torch.Tensor
    leave: tuple[torch.Tensor, torch.Tensor]


def plan_stage(
    *, batch: int, height: int, width: int, window: int, bytes_per_token: int, device: torch.device
) -> StagePlan:
    """The plan of a stage whose maps are (batch, height, width), with windows of `window` × `window` tokens.

    `bytes_per_token` is the size of a layer's widest intermediate result; it sets how many windows make a chunk.
    """
    windows_at_once = max(1, rows_at_once(device, bytes_per_token) // window**2)
    plain, shifted = (
        _plan_layer(batch, height, width, window, shift, windows_at_once, device) for shift in (0, window // 2)
    )
    back = (_inverse(plain.order), _inverse(shifted.order))
    return StagePlan(
        batch=batch,
        height=height,
        width=width,
        layers=(plain, shifted),
        enter=plain.order,
        shift=back[0][shifted.order],
        unshift=back[1][plain.order],
        leave=back,
    )


def window_masks(window: int, device: torch.device) -> torch.Tensor:
    """What a shifted layer adds to the attention scores of each kind of window: (4, area, area), 0 or -100.

    In the last row and column of windows the roll brought together what lies at opposite edges of the map; these
    halves must not see each other. The value is Swin's own.
    """
    place = torch.arange(window, device=device) >= window - window // 2
    masks = torch.zeros((4, window**2, window**2), device=device)
    for kind in range(1, 4):
        below = (place if kind & 2 else torch.zeros_like(place)).long()
        right = (place if kind & 1 else torch.zeros_like(place)).long()
        region = (2 * below[:, None] + right[None, :]).flatten()
        masks[kind] = torch.where(region[:, None] == region[None, :], 0.0, -100.0)
    return masks


def _plan_layer(
    batch: int, height: int, width: int, window: int, shift: int, windows_at_once: int, device: torch.device
) -> LayerPlan:
    rows = (torch.arange(-(-height // window) * window) + shift) % (-(-height // window) * window)
    columns = (torch.arange(-(-width // window) * window) + shift) % (-(-width // window) * window)
    raster = torch.where(
        (rows[:, None] < height) & (columns[None, :] < width), rows[:, None] * width + columns[None, :], -1
    )
    down, across = len(rows) // window, len(columns) // window
    places = raster.view(down, window, across, window).transpose(1, 2).reshape(down * across, window**2)
    kinds = torch.zeros((down, across), dtype=torch.int64)
    if shift:
        kinds[-1, :] += 2
        kinds[:, -1] += 1
    # Windows alike in mask and padding lie together, whichever image they are from.
    images = torch.arange(batch)[:, None, None] * height * width
    places = torch.where(places >= 0, places + images, -1).flatten(0, 1)
    alike = (2 * kinds.flatten() + (places[: down * across] < 0).any(dim=1)).repeat(batch)
    alike, sequence = alike.sort(stable=True)
    places = places[sequence]
    chunks = []
    start = 0
    for group in sorted(set(alike.tolist())):
        first = int((alike < group).sum())
        count = int((alike == group).sum())
        for left in range(first, first + count, windows_at_once):
            own = places[left : min(left + windows_at_once, first + count)].flatten()
            stop = start + int((own >= 0).sum())
            slots, real = _fill(own, device) if group % 2 else (None, None)
            chunks.append(Chunk(slice(start, stop), group // 2, slots, real))
            start = stop
    order = places.flatten()
    return LayerPlan(order[order >= 0].int().to(device), tuple(chunks))


def _fill(places: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    present = places >= 0
    count = int(present.sum())
    slots = torch.where(present, present.cumsum(0) - 1, count)
    return slots.int().to(device), present.nonzero()[:, 0].int().to(device)


def _inverse(order: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return inverse
