"""Labels from several passes over one image: what they say of a pixel is added up as probabilities.

Every sheet counts most at its own middle and fades out towards its borders, linearly, so tiles leave no seam. Sheets
are taken one by one from the top of the image down and dropped once their last row is labelled: an image of any height
takes the memory of the few that overlap.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch

from shared.inference.passes import Pass
from shared.inference.sampling import Axis, axis
from shared.inference.tiles import TILE_BYTES, sample

TILE_COLUMNS = 1024
"""At most so many columns are labelled together: few sheets reach over them."""


@dataclass(frozen=True)
class Sheet:
    """What the model gave for one pass: `planes` (V, h, w), and the `weights` (queries, channels) if V are queries."""

    planes: torch.Tensor
    weights: torch.Tensor | None
    shown: Pass


@dataclass(frozen=True)
class _Laid:
    """A sheet where it lies in the image, with the position of each of its pixel rows and columns in its planes."""

    planes: torch.Tensor
    weights: torch.Tensor | None
    rows: range
    columns: range
    down: Axis
    across: Axis
    fading: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, sheet: Sheet) -> Self:
        area, shown, planes = sheet.shown.area, sheet.shown, sheet.planes.float()
        # A mirrored pass is turned back here, and what was padded on its right then lies before its left.
        across = axis(area.width, planes.shape[2], area.width * shown.padded[0] / shown.size[0])
        return cls(
            planes=planes,
            weights=sheet.weights,
            rows=range(area.top, area.top + area.height),
            columns=range(area.left, area.left + area.width),
            down=axis(area.height, planes.shape[1], area.height * shown.padded[1] / shown.size[1]),
            across=across.reverse() if shown.mirrored else across,
            fading=(_fade(area.height, planes.device), _fade(area.width, planes.device)),
        )

    def add(self, scores: torch.Tensor, rows: range, columns: range) -> None:
        """Add this sheet's part to `scores` (channels, rows, columns)."""
        down, across = _common(self.rows, rows), _common(self.columns, columns)
        if not (down and across):
            return
        own_rows, own_columns = _from(self.rows.start, down), _from(self.columns.start, across)
        values = sample(self.planes, self.down, own_rows, self.across, own_columns)
        shares = (
            values.softmax(dim=0) if self.weights is None else torch.tensordot(self.weights.T, values.sigmoid_(), 1)
        )
        shares *= self.fading[0][_slice(own_rows), None] * self.fading[1][_slice(own_columns)]
        scores[:, _slice(_from(rows.start, down)), _slice(_from(columns.start, across))] += shares


def blend(
    sheets: Iterable[Sheet], *, size: tuple[int, int], confidence: bool, checkpoint: Callable[[], None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The winning channel and, if wanted, its share of all, uint8 (height, width) each.

    A channel's score at a pixel is the weighted sum over the sheets of its softmax probability, or for queries of the
    sum of sigmoid(mask) × weight. `sheets` come ordered by the top of their areas, cover the image, and are of one
    model. `checkpoint` is called before every tile and may raise to stop.
    """
    width, height = size
    coming = iter(sheets)
    following = next(coming, None)
    if following is None:
        raise ValueError("there is nothing to blend")
    device, weights = following.planes.device, following.weights
    count = following.planes.shape[0] if weights is None else weights.shape[1]
    rows_together = max(1, TILE_BYTES // (8 * (count + following.planes.shape[0])) // min(width, TILE_COLUMNS))
    winners = torch.empty((height, width), dtype=torch.uint8, device=device)
    shares = torch.empty_like(winners) if confidence else None
    laid: list[_Laid] = []
    top = 0
    while top < height:
        while following is not None and following.shown.area.top <= top:
            laid.append(_Laid.of(following))
            following = next(coming, None)
        rows = range(top, min(height, top + rows_together, height if following is None else following.shown.area.top))
        for left in range(0, width, TILE_COLUMNS):
            checkpoint()
            columns = range(left, min(left + TILE_COLUMNS, width))
            scores = torch.zeros((count, len(rows), len(columns)), device=device)
            for each in laid:
                each.add(scores, rows, columns)
            best, winner = scores.max(dim=0)
            winners[_slice(rows), _slice(columns)] = winner
            if shares is not None:
                shares[_slice(rows), _slice(columns)] = ((best / scores.sum(dim=0)).nan_to_num() * 255).round()
        top = rows.stop
        laid = [each for each in laid if each.rows.stop > top]
    return winners, shares


def _fade(length: int, device: torch.device) -> torch.Tensor:
    """1 in the middle of `length` pixels, falling evenly towards both ends and never 0."""
    position = torch.arange(length, dtype=torch.float32, device=device) + 0.5
    return torch.minimum(position, length - position) * (2 / length)


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _from(origin: int, positions: range) -> range:
    return range(positions.start - origin, positions.stop - origin)


def _slice(positions: range) -> slice:
    return slice(positions.start, positions.stop)
