"""Masks of a recording without the flicker of single frames, exactly the same however the recording is cut."""

from collections import deque
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_BLOCK_PIXELS = 2**18
"""Looked at together, so that what is needed beside the masks stays small whatever their size."""


class Smoother:
    """Shows a label once two frames in a row have it; takes the masks of a recording in order, one by one.

    With m(t) the mask of the processed frame t, the smoothed mask of t is, pixel by pixel,

        s(t) = m(t - i) for the least i in 0 … window - 2 with m(t - i) = m(t - i - 1), or m(t) if there is none:

    the newest label that two frames in a row gave among the last `window`, and where labels only alternate, the newest.
    So a label that stays passes unchanged, one that is there for a single frame is never seen while the frames before
    it give a pair, and a real change comes one frame late, whatever the window; a longer window only bridges longer
    unrest. A window of 1 or 2 changes nothing, one of 3 is a majority of three. The first frames use what there is.

    s(t) depends on the last `window` frames and on nothing else: masks are the same bit for bit from wherever the
    filter is begun, as long as it is given the `window` - 1 frames before the first that counts.

    A frame without a mask has none afterwards. It takes its place in the window without a say: the frames to both
    sides of it are in a row. Id 0, unlabeled, is a label like any other.

    Holds `window` masks. Raises ValueError for a window of less than one frame.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"a window has at least one frame, not {window}")
        self._recent: deque[NDArray[np.uint8] | None] = deque(maxlen=window)

    def smooth(self, mask: NDArray[np.uint8] | None) -> NDArray[np.uint8] | None:
        """The next frame's mask, uint8 (height, width), smoothed: a new array; None where there is no mask.

        The mask is kept and must not be changed. Raises ValueError for another dtype or a size that is not the others'.
        """
        if mask is not None:
            self._check(mask)
        # Rows that do not lie one after the other would be copied once for every frame that looks back at them.
        self._recent.append(None if mask is None else np.ascontiguousarray(mask))
        if mask is None:
            return None
        return _choose([each.reshape(-1) for each in reversed(self._recent) if each is not None]).reshape(mask.shape)

    def _check(self, mask: NDArray[np.uint8]) -> None:
        if mask.dtype != np.uint8 or mask.ndim != 2:
            raise ValueError(f"a mask is uint8 (height, width), not {mask.dtype} {mask.shape}")
        for other in self._recent:
            if other is not None and other.shape != mask.shape:
                raise ValueError(f"a mask of {mask.shape} does not follow one of {other.shape}")


def _choose(masks: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """From masks of (pixels), the newest first, the label of each pixel's newest pair, else the newest label."""
    chosen = masks[0].copy()
    if len(masks) < 3:
        return chosen
    for start in range(0, len(chosen), _BLOCK_PIXELS):
        block = slice(start, start + _BLOCK_PIXELS)
        # Nearly all pixels have the same label as before, so only few are looked at any further.
        unsettled = np.flatnonzero(masks[0][block] != masks[1][block]) + start
        for newer, older in pairwise(masks[1:]):
            if not unsettled.size:
                break
            labels = newer[unsettled]
            settled = labels == older[unsettled]
            chosen[unsettled[settled]] = labels[settled]
            unsettled = unsettled[~settled]
    return chosen
