"""Where the pixels of an image lie between the samples of a model's output, one axis at a time.

Bilinear resizing with align_corners=False: position p of `length` lies at (p + 0.5) × samples / length - 0.5, clamped
to the first and last sample.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

MAX_RUN = 16
"""The most positions in one run; longer ones would be evaluated whole for the border that crosses a corner of them."""


@dataclass(frozen=True)
class Axis:
    """Every position of one axis, and the runs of neighbours that lie between the same two samples.

    A position's value is (1 - weight) × sample[lower] + weight × sample[upper]; `lower` and `upper` int64, `weight`
    float32, one each per position. Run r is the positions from `starts[r]` up to `starts[r + 1]`.
    """

    lower: NDArray[np.int64]
    upper: NDArray[np.int64]
    weight: NDArray[np.float32]
    starts: NDArray[np.int64]

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return len(self.starts) - 1

    def reverse(self) -> Self:
        """The same positions from the last to the first."""
        starts = len(self.lower) - self.starts[::-1]
        return replace(
            self, lower=self.lower[::-1].copy(), upper=self.upper[::-1].copy(),
            weight=self.weight[::-1].copy(), starts=starts,
        )  # fmt: skip


def axis(length: int, samples: int, span: float | None = None) -> Axis:
    """The axis of `length` positions over `samples` samples, both at least 1.

    `span` is how many positions the samples reach over, where they go on beyond the last position.
    """
    # Double precision: single would misplace positions by hundredths of a cell in the longest images.
    exact = (np.arange(length, dtype=np.float64) + 0.5) * (samples / (span or length)) - 0.5
    exact = exact.clip(0, samples - 1)
    # The last sample is the end of the cell before it, not the start of one of its own.
    lower = np.minimum(np.floor(exact).astype(np.int64), max(samples - 2, 0))
    upper = np.minimum(lower + 1, samples - 1)
    changes = np.flatnonzero(np.diff(lower, prepend=-1))
    since_change = np.arange(length) - np.repeat(changes, np.diff(changes, append=length))
    starts = np.append(np.flatnonzero(since_change % MAX_RUN == 0), length)
    return Axis(lower=lower, upper=upper, weight=(exact - lower).astype(np.float32), starts=starts)
