"""Which parts of an image the model is shown, at which size and how often: the passes that make one mask."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shared.inference.errors import MediaLimit
from shared.inference.modes import Mode, PublishedInput
from shared.inference.recipe import Recipe
from shared.inference.resize import MAX_ASPECT, STRIDE, fit_size

TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Of the input's sides, each also mirrored: how Mask2Former (320 to 1120 for 640) and SegFormer were evaluated."""
MAX_PASSES = 4096
"""More would keep a worker for hours with one image."""
SPLIT_OVERLAP = 0.25
"""Of a tile's sides, where a pass is split because it does not fit the memory."""

Size = tuple[int, int]


@dataclass(frozen=True, order=True)
class Area:
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, order=True)
class Pass:
    """`area` resized to `size` (width, height), mirrored if `mirrored`, then padded right and below to `padded`."""

    area: Area
    size: Size
    padded: Size
    mirrored: bool = False


def plan(width: int, height: int, mode: Mode, recipe: Recipe) -> tuple[Pass, ...]:
    """The passes for an image of this size, from its top to its bottom.

    Raises MediaLimit for an image that would take more than MAX_PASSES.
    """
    side = recipe.input_size or mode.input_size
    scales = TTA_SCALES if recipe.tta else (1.0,)
    mirrors = (False, True) if recipe.tta else (False,)
    whole = Area(0, 0, height, width)
    areas = list(_tile(whole, _align(side), recipe.tile_overlap)) if recipe.tiles else [whole]
    if len(areas) * len(scales) * len(mirrors) > MAX_PASSES:
        raise MediaLimit(
            f"tiles of {side}×{side} would take more than {MAX_PASSES} passes over {width}×{height} pixels"
        )
    passes = []
    for area in areas:
        for scale in scales:
            if area != whole:
                size = padded = (_align(area.width * scale), _align(area.height * scale))
            elif recipe.resize == "published" and mode.published:
                size, padded = _fit_as_published(width, height, mode.published, scale)
            else:
                size = padded = fit_size(width, height, max(STRIDE, round(side * scale)))
            passes += [Pass(area, size, padded, mirrored) for mirrored in mirrors]
    return tuple(passes)


def split(passes: tuple[Pass, ...], parts: int) -> tuple[Pass, ...]:
    """The same at the same scales, every area cut into up to `parts` × `parts` tiles that overlap.

    A pass then takes a fraction of the memory, and the model sees less of what is around each pixel.
    """
    tiles = []
    for each in passes:
        area = each.area
        across, down = each.size[0] / area.width, each.size[1] / area.height
        for tile in _cross(area, _cut(area.height, parts), _cut(area.width, parts)):
            size = (_align(tile.width * across), _align(tile.height * down))
            tiles.append(Pass(tile, size, size, each.mirrored))
    return tuple(sorted(tiles))


def _tile(area: Area, side: int, overlap: float) -> Iterator[Area]:
    """Squares of `side`, or less where the area has less, that share at least `overlap` of their sides."""
    step = max(1, math.floor(side * (1 - overlap)))
    down, across = (
        _spread(length, side, 1 + math.ceil((length - side) / step)) for length in (area.height, area.width)
    )
    return _cross(area, down, across)


def _cut(length: int, parts: int) -> list[range]:
    return _spread(length, math.ceil(length / (parts - (parts - 1) * SPLIT_OVERLAP)), parts)


def _spread(length: int, side: int, count: int) -> list[range]:
    """`count` pieces of `side`, evenly spread over `length`."""
    if length <= side:
        return [range(length)]
    starts = [(length - side) * number // (count - 1) for number in range(count)]
    return [range(start, start + side) for start in starts]


def _cross(area: Area, down: list[range], across: list[range]) -> Iterator[Area]:
    for rows in down:
        for columns in across:
            yield Area(area.top + rows.start, area.left + columns.start, len(rows), len(columns))


def _align(length: float) -> int:
    return max(STRIDE, math.ceil(length / STRIDE) * STRIDE)


def _fit_as_published(width: int, height: int, published: PublishedInput, scale: float) -> tuple[Size, Size]:
    """The size the image is resized to, and that with its padding."""
    # An image as thin as a line would become millions of pixels long.
    shorter, longer = sorted((width, height))
    ratio = min(longer / shorter, MAX_ASPECT)
    short, most = published.shorter * scale, (published.longer or math.inf) * scale
    if short * ratio > most:
        short = most / ratio
    sides = [max(1, math.floor(side + published.rounding)) for side in (short, short * ratio)]
    size = (sides[1], sides[0]) if width >= height else (sides[0], sides[1])
    aligned = (_align(size[0]), _align(size[1]))
    return (aligned if published.align == "stretch" else size), (size if published.align == "no" else aligned)
