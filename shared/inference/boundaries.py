"""How well borders are followed: the boundary F-score of every class of one image.

After Csurka, Larlus and Perronnin, "What is a good evaluation measure for semantic segmentation?" (BMVC 2013): the
share of one map's boundary pixels that have a boundary pixel of the same class within a tolerance in the other map is
the precision (from the mask's side) and the recall (from the truth's). It needs numpy alone.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

DIAGONAL_SHARE = 0.0075
"""The tolerance as a share of the image's diagonal, as in the paper."""
UNCOMPARED = 255
"""In both maps alike: a pixel that is not compared. In a map of boundaries: a pixel that is on none."""


def choose_tolerance(height: int, width: int) -> int:
    """0.75 % of the diagonal in whole pixels, rounded to the nearest, at least 1."""
    return max(1, math.floor(DIAGONAL_SHARE * math.hypot(height, width) + 0.5))


def score_boundaries(truth: NDArray[np.uint8], mask: NDArray[np.uint8], *, tolerance: int) -> NDArray[np.float64]:
    """The F-score by class id, shape (256,); NaN for a class that has a boundary in neither map.

    A boundary pixel of a class has one of its four neighbours in another class; the image's own edge is no boundary.
    The tolerance is Euclidean and inclusive. A class with a boundary in one map only scores 0. Pixels that are not
    compared are UNCOMPARED in both maps: where both have the same class beside such an area, its edge is a boundary of
    both.
    """
    true_edges, found_edges = _trace(truth), _trace(mask)
    precision = _match(found_edges, true_edges, tolerance)
    recall = _match(true_edges, found_edges, tolerance)
    both = np.nan_to_num(precision) + np.nan_to_num(recall)
    scores = np.divide(2 * precision * recall, both, out=np.zeros(256), where=both > 0)
    scores[np.isnan(precision) & np.isnan(recall)] = np.nan
    return scores


def _trace(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class of every boundary pixel, and UNCOMPARED everywhere else."""
    edge = np.zeros(labels.shape, dtype=bool)
    across = labels[:, 1:] != labels[:, :-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    down = labels[1:] != labels[:-1]
    edge[1:] |= down
    edge[:-1] |= down
    return np.where(edge, labels, np.uint8(UNCOMPARED))


def _match(edges: NDArray[np.uint8], others: NDArray[np.uint8], tolerance: int) -> NDArray[np.float64]:
    """By class: the share of its pixels in `edges` near enough to one of its pixels in `others`; NaN without any.

    This equals a dilation of every class with a disc. But most boundary pixels find their match after a few steps, so
    walking outwards from those that are left costs far less, and is the same walk for all classes.
    """
    rows, columns = np.nonzero(edges != UNCOMPARED)
    classes = edges[rows, columns]
    total = np.bincount(classes, minlength=256)
    hopeful = _have_company(rows, columns, classes, others, tolerance)
    alone = np.bincount(classes[~hopeful], minlength=256)
    rows, columns, classes = rows[hopeful], columns[hopeful], classes[hopeful]
    padded = np.pad(others, tolerance, constant_values=UNCOMPARED)
    width = padded.shape[1]
    places = (rows + tolerance) * width + columns + tolerance
    flat = padded.ravel()
    for down, across in _disc(tolerance):
        left = flat[places + (down * width + across)] != classes
        places, classes = places[left], classes[left]
    matched = total - alone - np.bincount(classes, minlength=256)
    shares = np.full(256, np.nan)
    np.divide(matched, total, out=shares, where=total > 0)
    return shares


def _have_company(
    rows: NDArray[np.intp], columns: NDArray[np.intp], classes: NDArray[np.uint8], others: NDArray[np.uint8], cell: int
) -> NDArray[np.bool_]:
    """Which pixels have one of their class in their own cell of a grid, or in one of the eight around it, in `others`.

    What lacks that has no match within a cell's side. Without this, the many boundaries of a noisy mask would walk the
    whole disc in vain, which takes minutes.
    """
    height, width = (-(-side // cell) + 2 for side in others.shape)
    there = np.zeros((256, height, width), dtype=bool)
    other_rows, other_columns = np.nonzero(others != UNCOMPARED)
    there[others[other_rows, other_columns], other_rows // cell + 1, other_columns // cell + 1] = True
    there[:, 1:-1] |= there[:, :-2] | there[:, 2:]
    there[:, :, 1:-1] |= there[:, :, :-2] | there[:, :, 2:]
    found: NDArray[np.bool_] = there[classes, rows // cell + 1, columns // cell + 1]
    return found


def _disc(radius: int) -> Iterator[tuple[int, int]]:
    """The steps no longer than the radius, the shortest first."""
    reach = range(-radius, radius + 1)
    steps = ((down, across) for down in reach for across in reach if down * down + across * across <= radius * radius)
    yield from sorted(steps, key=lambda step: step[0] ** 2 + step[1] ** 2)
