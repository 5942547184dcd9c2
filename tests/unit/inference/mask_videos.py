"""Masks and videos of masks, for the tests of both."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shared.inference.mask_video import MaskVideoWriter, read_masks

Mask = NDArray[np.uint8]
Size = tuple[int, int]

MILLISECONDS = Fraction(1, 1000)
VIDEO_CLOCK = Fraction(1, 90000)


def blobs(size: Size, seed: int) -> Mask:
    """A map of regions, as a model gives, with every id possible."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 7), dtype=np.uint8)
    return cv2.resize(cells, size, interpolation=cv2.INTER_NEAREST).astype(np.uint8)


def noise(size: Size, seed: int) -> Mask:
    return np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)


def write(
    path: Path,
    masks: Sequence[Mask],
    times: Sequence[int] | None = None,
    *,
    time_base: Fraction = MILLISECONDS,
    threads: int = 1,
) -> Path:
    height, width = masks[0].shape
    with MaskVideoWriter(path, (width, height), time_base, threads=threads) as video:
        for number, mask in enumerate(masks):
            video.write(mask, times[number] if times else 40 * number)
    return path


def copy_packets(sources: Sequence[Path], target: Path, *, without: int | None = None) -> Path:
    """What any tool does that joins files without decoding; `without` leaves one frame out."""
    with av.open(target, "w", format="matroska") as joined:
        into: VideoStream | None = None
        number = 0
        for source in sources:
            with av.open(source) as part:
                [stream] = part.streams.video
                into = into or copy_stream(stream, joined)
                for packet in part.demux(stream):
                    if packet.size and number != without:
                        packet.stream = into
                        joined.mux(packet)
                    number += bool(packet.size)
    return target


def copy_stream(stream: VideoStream, joined: OutputContainer) -> VideoStream:
    copied = joined.add_stream_from_template(stream)
    copied.metadata.update(stream.metadata)
    return copied


def assert_holds(path: Path, masks: Sequence[Mask]) -> None:
    for (_, found), mask in zip(read_masks(path), masks, strict=True):
        assert found.dtype == np.uint8
        assert np.array_equal(found, mask)
