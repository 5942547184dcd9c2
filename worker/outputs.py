"""The files that a chunk of a recording becomes: masks and their confidence, an overlay for people, and areas."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.contract import Options
from shared.inference import masks
from shared.inference.frames import Frame
from shared.inference.mask_video import MaskVideoWriter
from shared.inference.modes import MODES
from shared.inference.overlay_video import OverlayVideoWriter
from shared.inference.recording import Header
from shared.inference.smoothing import Smoother
from worker.tables import AreasHeader, AreasWriter, FrameAreas

if TYPE_CHECKING:
    from shared.inference.engine import Segmentation

MASKS, CONFIDENCE, OVERLAY, AREAS = "masks.mkv", "confidence.mkv", "overlay.mp4", "areas.parquet"
CONTENT_TYPES = {
    MASKS: "video/x-matroska",
    CONFIDENCE: "video/x-matroska",
    OVERLAY: "video/mp4",
    AREAS: "application/vnd.apache.parquet",
}


class Outputs:
    """Takes frames in their order. The mask of a frame that could not be decoded is 0 everywhere.

    Those before frame `first` leave nothing behind but their say in the smoothed masks of the frames after them.
    """

    def __init__(
        self, folder: Path, mode: str, options: Options, header: Header, stack: ExitStack, *, first: int
    ) -> None:
        self._first = first
        self._smoother = Smoother(options.smooth_window)
        self._labels = MODES[mode].labels
        self._size = header.upright_size
        self.areas: Counter[int] = Counter()
        """Pixels of each class id, over all frames."""
        self._folder = folder
        self._names = [AREAS]

        def open_masks(name: str) -> MaskVideoWriter:
            self._names.append(name)
            return stack.enter_context(MaskVideoWriter(folder / name, self._size, header.time_base))

        self._masks = open_masks(MASKS) if "mask" in options.outputs else None
        self._confidence = open_masks(CONFIDENCE) if "confidence" in options.outputs else None
        self._wants_overlay = "overlay" in options.outputs
        self._overlay: OverlayVideoWriter | None = None
        areas = AreasHeader(self._size, header.time_base, self._labels)
        self._areas = stack.enter_context(AreasWriter(folder / AREAS, areas))
        self._time_base = header.time_base
        self._stack = stack

    @property
    def files(self) -> list[tuple[Path, str]]:
        """The paths and their content types, once all is written."""
        return [(self._folder / name, CONTENT_TYPES[name]) for name in self._names]

    def write(self, frame: Frame, made: "Segmentation | None") -> None:
        smooth = self._smoother.smooth(None if made is None else made.mask)
        if frame.number < self._first:
            return
        width, height = self._size
        mask = np.zeros((height, width), dtype=np.uint8) if smooth is None else smooth
        if self._masks:
            self._masks.write(mask, frame.pts)
        if self._confidence:
            sure = np.zeros_like(mask) if made is None or made.confidence is None else made.confidence
            self._confidence.write(sure, frame.pts)
        if made is None or frame.image is None:
            return
        areas = masks.class_areas(mask)
        self.areas.update(areas)
        self._areas.write(FrameAreas(frame.number, frame.pts, areas))
        if self._wants_overlay:
            self._write_overlay(masks.overlay(frame.image, mask, self._labels), frame.pts)

    def _write_overlay(self, picture: NDArray[np.uint8], pts: int) -> None:
        if self._overlay is None:  # not before there is something to show, as there is no video without a picture
            self._names.append(OVERLAY)
            self._overlay = self._stack.enter_context(
                OverlayVideoWriter(self._folder / OVERLAY, self._size, self._time_base)
            )
        self._overlay.write(picture, pts)


@contextmanager
def open_outputs(folder: Path, mode: str, options: Options, header: Header, *, first: int) -> Iterator[Outputs]:
    """Files that are whole once the block has ended without an error."""
    with ExitStack() as stack:
        yield Outputs(folder, mode, options, header, stack, first=first)
