"""Scores of masks against the truth, as the benchmarks count them: a confusion matrix, filled image by image.

Nothing is averaged before the end: intersections and unions are those of the whole set. Only the boundary F-score is
one per image, as its authors want it (see boundaries). Numpy alone; files are read elsewhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.inference.boundaries import UNCOMPARED, choose_tolerance, score_boundaries
from shared.inference.errors import InvalidMedia
from shared.inference.labels import ADE20K, DEMO, VOC, LabelSpace


@dataclass(frozen=True)
class Protocol:
    """What a benchmark compares: every class of its label space but `ignored`, where the truth is not `ignored`."""

    label_space: LabelSpace
    ignored: int
    """The id that stands in truth files for "not labeled". A mask that has it where there is a truth is wrong there."""

    @property
    def compared(self) -> tuple[int, ...]:
        return tuple(number for number in range(len(self.label_space.classes)) if number != self.ignored)


PROTOCOLS = {
    protocol.label_space.name: protocol
    for protocol in (
        Protocol(ADE20K, ignored=0),  # SceneParse150: 0 is "other objects", 1..150 are compared
        Protocol(VOC, ignored=255),  # 255 is void, the contested rim of things; 0, background, is a class
        Protocol(DEMO, ignored=0),
    )
}


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class over all images; None where there is nothing to divide by.

    `iou` is None for a class that neither truth nor masks have, `accuracy` (the share of the class's pixels that the
    masks found) for one that the truth lacks, `boundary_f` for one without a boundary anywhere.
    """

    id: int
    name: str
    iou: float | None
    accuracy: float | None
    boundary_f: float | None
    pixels: int
    """How many the truth has."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Fractions of 1. The means run over the classes that have a figure, as mmsegmentation's do.

    So a class that the masks have and the truth lacks lowers `miou` by its 0. Detectron2 leaves such a class out, and
    the ADE20K and VOC kits expect none to be missing; where every class occurs in the truth, as in the whole
    validation sets, all four agree. `boundary_f` is the mean over images of each image's mean over its classes.
    """

    images: int
    pixels: int
    """How many were compared."""
    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    boundary_f: float | None
    classes: tuple[ClassScore, ...]


class Tally:
    """What has been seen so far; its size does not grow with the images."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._confusion = np.zeros((256, 256), dtype=np.int64)
        self._boundaries = np.zeros(256)
        self._bounded_images = np.zeros(256, dtype=np.int64)
        self._image_means: list[float] = []
        self._images = 0

    def add(self, *, truth: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
        """Count an image: both uint8 (height, width). InvalidMedia for unlike sizes and unknown ids; it counts not."""
        if truth.shape != mask.shape:
            raise InvalidMedia(f"The truth has {_describe_size(truth)} pixels and the mask {_describe_size(mask)}")
        pairs = np.bincount((truth.astype(np.uint16) << 8 | mask).ravel(), minlength=65536).reshape(256, 256)
        known = set(range(len(self._protocol.label_space.classes)))
        self._check_ids("truth", pairs.sum(axis=1), known | {self._protocol.ignored})
        self._check_ids("mask", pairs.sum(axis=0), known)
        self._confusion += pairs
        self._images += 1
        self._add_boundaries(truth, mask)

    def score(self) -> Scores:
        """Raises InvalidMedia when no labeled pixel has been seen."""
        compared = np.array(self._protocol.compared)
        labeled = self._confusion[compared]  # a row for each class of the truth: what was ignored is gone
        hits = self._confusion[compared, compared]
        true, found = labeled.sum(axis=1), labeled.sum(axis=0)[compared]
        pixels = int(true.sum())
        if not pixels:
            raise InvalidMedia("The truth has no labeled pixel")
        iou = _divide(hits, true + found - hits)
        accuracy = _divide(hits, true)
        boundary = _divide(self._boundaries, self._bounded_images)[compared]
        return Scores(
            images=self._images,
            pixels=pixels,
            miou=float(np.nanmean(iou)),
            mean_accuracy=float(np.nanmean(accuracy)),
            pixel_accuracy=int(hits.sum()) / pixels,
            boundary_f=float(np.mean(self._image_means)) if self._image_means else None,
            classes=tuple(
                ClassScore(
                    id=number,
                    name=self._protocol.label_space.classes[number],
                    iou=_figure(iou[place]),
                    accuracy=_figure(accuracy[place]),
                    boundary_f=_figure(boundary[place]),
                    pixels=int(true[place]),
                )
                for place, number in enumerate(self._protocol.compared)
            ),
        )

    def _check_ids(self, whose: str, counts: NDArray[np.int64], known: set[int]) -> None:
        strange = sorted(set(np.flatnonzero(counts).tolist()) - known)
        if strange:
            space = self._protocol.label_space
            raise InvalidMedia(
                f"The {whose} has pixels of id {', '.join(map(str, strange[:5]))}, which {space.name} does not know"
            )

    def _add_boundaries(self, truth: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
        ignored = truth == self._protocol.ignored
        scores = score_boundaries(
            np.where(ignored, np.uint8(UNCOMPARED), truth),
            np.where(ignored, np.uint8(UNCOMPARED), mask),
            tolerance=choose_tolerance(*truth.shape),
        )
        bounded = np.zeros(256, dtype=bool)
        bounded[list(self._protocol.compared)] = True
        bounded &= ~np.isnan(scores)
        if bounded.any():
            self._boundaries[bounded] += scores[bounded]
            self._bounded_images += bounded
            self._image_means.append(float(scores[bounded].mean()))


def _divide(parts: NDArray[np.int64] | NDArray[np.float64], wholes: NDArray[np.int64]) -> NDArray[np.float64]:
    shares = np.full(wholes.shape, np.nan)
    np.divide(parts, wholes, out=shares, where=wholes > 0)
    return shares


def _figure(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _describe_size(labels: NDArray[np.uint8]) -> str:
    return f"{labels.shape[1]}×{labels.shape[0]}"
