"""How well every channel does at a point, and which one wins a whole area, told from the range of values in it.

Values are what the model gives per sample: mask logits of queries, or logits of channels. Both are interpolated
linearly between four corners, so in the area between them they stay within the corners' range.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

_MARGIN = np.float32(2e-5)
"""Scores this close, relative to the larger, may be in either order after single-precision sums of 100 terms."""

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """Of each area: the winner and its confidence (0 unless asked for), whether both are certain, and who may win.

    `may_win` is (areas, all channels); the others are (areas,).
    """

    channel: Bytes
    confidence: Bytes
    certain: Flags
    may_win: Flags


class Scores(Protocol):
    """One kind of model output as the cells see it, V values per sample, over the channels that can still win."""

    @property
    def confidence(self) -> bool:
        """Whether the confidence of a winner is wanted."""

    def judge_range(self, low: torch.Tensor, high: torch.Tensor) -> Verdict:
        """Judge areas by the range of their values, (areas, V) each."""

    def judge_corners(self, corners: torch.Tensor) -> Verdict:
        """Judge areas by the values at their four corners, (areas, 4, V), which are overwritten."""

    def judge_points(self, values: torch.Tensor) -> tuple[Bytes, Bytes]:
        """Channel and confidence of each point from its values, (points, V), which are overwritten."""

    def narrow(self, may_win: Flags) -> tuple[Self, torch.Tensor | None]:
        """The same for areas where only these channels (all channels,) may win; and which values it takes, or all."""


@dataclass(frozen=True)
class QueryScores:
    """Mask classification: a channel's score is the sum over queries of sigmoid(mask) × weight, weights >= 0.

    `weights` is (queries, channels), `channels` their numbers among `count`. The sigmoid rises and no weight is
    negative, so the scores of the lowest and of the highest mask values bound those in between. With `confidence` the
    last column is the sum over all channels, and a winner's confidence is its share of that sum.
    """

    weights: torch.Tensor
    channels: Indices
    count: int
    confidence: bool

    @classmethod
    def of(cls, weights: torch.Tensor, *, confidence: bool) -> Self:
        """The scores of all channels, `weights` (queries, channels)."""
        count = weights.shape[1]
        if confidence:
            weights = torch.cat([weights, weights.sum(dim=1, keepdim=True)], dim=1)
        return cls(weights=weights, channels=np.arange(count), count=count, confidence=confidence)

    def judge_range(self, low: torch.Tensor, high: torch.Tensor) -> Verdict:
        return self._judge(low.sigmoid(), high.sigmoid())

    def judge_corners(self, corners: torch.Tensor) -> Verdict:
        low, high = _range(corners.sigmoid_())
        return self._judge(low, high)

    def judge_points(self, values: torch.Tensor) -> tuple[Bytes, Bytes]:
        scores = torch.mm(values.sigmoid_(), self.weights).numpy()
        # NumPy's argmax is several times faster than torch's on a CPU.
        winner = scores[:, : len(self.channels)].argmax(axis=1)
        confidence = _to_byte(_share(_pick(scores, winner), scores[:, -1])) if self.confidence else _nothing(winner)
        return self.channels[winner].astype(np.uint8), confidence

    def narrow(self, may_win: Flags) -> tuple[Self, torch.Tensor | None]:
        columns = np.flatnonzero(may_win[self.channels])
        # A product costs about the same for a few columns more or less, and copying them is not free.
        if len(columns) > 0.8 * len(self.channels):
            return self, None
        taken = np.append(columns, len(self.channels)) if self.confidence else columns
        weights = self.weights.index_select(1, torch.from_numpy(taken))
        return replace(self, weights=weights, channels=self.channels[columns]), None

    def _judge(self, low: torch.Tensor, high: torch.Tensor) -> Verdict:
        least, most = torch.mm(low, self.weights).numpy(), torch.mm(high, self.weights).numpy()
        count = len(self.channels)
        winner = least[:, :count].argmax(axis=1)
        floor, ceiling = _pick(least, winner), _pick(most, winner)
        # Written so that a NaN leaves its area uncertain.
        contenders = ~(most[:, :count] < (floor * (1 - _MARGIN))[:, None])
        certain = contenders.sum(axis=1) == 1
        confidence = _nothing(winner)
        if self.confidence:
            others_least, others_most = least[:, -1] - floor, most[:, -1] - ceiling
            confidence = _to_byte(_share(floor, floor + others_most) - _MARGIN)
            certain &= confidence == _to_byte(_share(ceiling, ceiling + others_least) + _MARGIN)
        may_win = _among(contenders, self.channels, self.count)
        return Verdict(self.channels[winner].astype(np.uint8), confidence, certain, may_win)


@dataclass(frozen=True)
class PixelScores:
    """Per-pixel classification: a channel's value is its score. Confidence is the winner's softmax probability.

    `channels` are the numbers of the values among `count`.
    """

    channels: Indices
    count: int
    confidence: bool

    @classmethod
    def of(cls, count: int, *, confidence: bool) -> Self:
        """The scores of `count` channels."""
        return cls(channels=np.arange(count), count=count, confidence=confidence)

    def judge_range(self, low: torch.Tensor, high: torch.Tensor) -> Verdict:
        winner = low.numpy().argmax(axis=1)
        return self._verdict(winner, ~(high.numpy() < _pick(low.numpy(), winner)[:, None]), low, high)

    def judge_corners(self, corners: torch.Tensor) -> Verdict:
        values = corners.numpy()
        winner = values[:, 0].argmax(axis=1)
        # Whoever is behind at all four corners is behind in between: the difference of two channels is interpolated
        # as they are. This decides more than the ranges of both would.
        champion = np.take_along_axis(values, winner[:, None, None], axis=2)
        low, high = _range(corners) if self.confidence else (corners, corners)
        behind: Flags = np.logical_and.reduce(values < champion, axis=1)
        return self._verdict(winner, ~behind, low, high)

    def judge_points(self, values: torch.Tensor) -> tuple[Bytes, Bytes]:
        winner = values.numpy().argmax(axis=1)
        confidence = _to_byte(_pick(values.softmax(dim=1).numpy(), winner)) if self.confidence else _nothing(winner)
        return self.channels[winner].astype(np.uint8), confidence

    def narrow(self, may_win: Flags) -> tuple[Self, torch.Tensor | None]:
        columns = np.flatnonzero(may_win[self.channels])
        # A probability needs the channels that lose, too.
        if self.confidence or len(columns) > 0.8 * len(self.channels):
            return self, None
        return replace(self, channels=self.channels[columns]), torch.from_numpy(columns)

    def _verdict(self, winner: Indices, contenders: Flags, low: torch.Tensor, high: torch.Tensor) -> Verdict:
        certain = contenders.sum(axis=1) == 1
        confidence = _nothing(winner)
        if self.confidence:
            index = torch.from_numpy(winner)[:, None]
            floor, ceiling = low.gather(1, index), high.gather(1, index)
            # The winner at its worst against the others at their best, and the other way round.
            worst: Floats = (high.scatter(1, index, floor) - floor).exp().sum(dim=1).reciprocal().numpy()
            best: Floats = (low.scatter(1, index, ceiling) - ceiling).exp().sum(dim=1).reciprocal().numpy()
            confidence = _to_byte(worst - _MARGIN)
            certain &= confidence == _to_byte(best + _MARGIN)
        may_win = _among(contenders, self.channels, self.count)
        return Verdict(self.channels[winner].astype(np.uint8), confidence, certain, may_win)


def _range(corners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Twice as fast as amin and amax over the second of three dimensions.
    a, b, c, d = corners.unbind(dim=1)
    low = torch.minimum(torch.minimum(a, b), torch.minimum(c, d))
    high = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
    return low, high


def _among(flags: Flags, channels: Indices, count: int) -> Flags:
    """Spread flags (areas, channels) over all `count` channels."""
    if len(channels) == count:
        return flags
    spread = np.zeros((len(flags), count), dtype=np.bool_)
    spread[:, channels] = flags
    return spread


def _nothing(winner: Indices) -> Bytes:
    return np.zeros(len(winner), dtype=np.uint8)


def _pick(table: Floats, column: Indices) -> Floats:
    return table[np.arange(len(column)), column]


def _share(part: Floats, total: Floats) -> Floats:
    return np.divide(part, np.maximum(total, np.finfo(np.float32).tiny), dtype=np.float32)


def _to_byte(share: Floats) -> Bytes:
    rounded: Floats = np.rint(np.nan_to_num(share).clip(0, 1) * 255)
    return rounded.astype(np.uint8)
