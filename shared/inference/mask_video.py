"""The masks of a recording as one lossless video: FFV1 in Matroska, 8-bit gray, a class id per pixel.

Every frame stands alone and every writer makes the same codec header for a size, so what was written apart is joined
by copying packets. Beside its pixels each frame carries what would be lost otherwise: its exact time, because
Matroska's clock has whole milliseconds here, and its number and checksum, because FFmpeg's decoder fills a damaged
place from the frame before and tells nobody but its log.
"""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet, PacketSideData, packet_sidedata_type_from_literal
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shared.inference.errors import InvalidMedia, OutOfMemory

_OPTIONS = {"level": "3", "g": "1", "coder": "rice", "context": "0", "slicecrc": "1"}
"""Chosen by bench/codecs.py, time first. Rice codes have runs, which label maps are made of: faster than the range
coder both ways, and smaller than it where outlines are clean, though larger where they are ragged. The larger context
costs time and bytes. Checksums of slices cost next to nothing; other readers than ours check them.
"""
_TIME_BASE_TAG = "TIME_BASE"
_SIDE_DATA: Final = "matroska_block_additional"
_CODEC_SPECIFIC = 1
"""The one kind of addition to a block that needs no declaration in the track, and the one that FFmpeg writes."""
_ADDITION = struct.Struct(">QI?qI")
"""Kind, number of the frame, whether it is the last one written, time, checksum."""
_CHECKED = struct.Struct(">IIiiI?q")
"""What the checksum covers after the pixels: width, height, time base, number, whether the last, time."""
_LONGEST_SECONDS = 2**32
"""136 years to either side of 0: epoch times fit, and the container's clock is far from its end."""
_DAMAGED = "The mask video is damaged or no mask video"


@dataclass(frozen=True)
class MaskVideo:
    """What holds for all frames: (width, height), and the seconds that a time counts in."""

    size: tuple[int, int]
    time_base: Fraction


class MaskVideoWriter:
    """Writes masks one after the other; the same masks give the same bytes.

    A context manager: left by an exception, the file stays unfinished, which a reader notices.
    """

    def __init__(self, path: Path | str, size: tuple[int, int], time_base: Fraction, *, threads: int = 1) -> None:
        """Begin a file of masks of `size` (width, height). More than `_count_slices` threads have nothing to do.

        Raises ValueError for a size that FFV1 does not take (2**28 pixels, one column of more than 288 rows) or a
        time base that is not positive or beyond 31 bits, and OSError if the path cannot be written.
        """
        if time_base <= 0 or max(time_base.as_integer_ratio()) >= 2**31:
            raise ValueError(f"{time_base} s is no time base")
        self._video = MaskVideo(size, time_base)
        self._number = 0
        self._waiting: tuple[Packet[VideoStream], int, int] | None = None
        # An own file, because closing it first leaves the container unfinished.
        self._file = Path(path).open("wb")  # noqa: SIM115
        try:
            # Bit-exact: no random ids, no version of the library, no date.
            self._container = av.open(self._file, "w", format="matroska", container_options={"fflags": "bitexact"})
            self._stream = self._add_stream(threads)
            self._container.start_encoding()
        except (ValueError, NotImplementedError) as error:
            self._file.close()
            raise ValueError(f"FFV1 takes no masks of {size[0]}×{size[1]}") from error
        except BaseException:
            self._file.close()
            raise

    def _add_stream(self, threads: int) -> VideoStream:
        width, height = self._video.size
        stream = self._container.add_stream(
            "ffv1", options={**_OPTIONS, "slices": str(_count_slices(width, height))}, width=width, height=height
        )
        stream.time_base = self._video.time_base
        stream.metadata[_TIME_BASE_TAG] = str(self._video.time_base)
        context = stream.codec_context
        context.time_base = self._video.time_base
        # None: a rate would be written into the file as every frame's duration.
        context.framerate = Fraction(0)
        context.pix_fmt = "gray"
        # Full range: 0..255, nothing to be stretched. FFmpeg reads gray so in any case, other readers may ask.
        context.color_range = ColorRange.JPEG
        # Threads by frames would hold frames back.
        context.thread_type = av.codec.context.ThreadType.SLICE
        context.thread_count = threads
        return stream

    def write(self, mask: NDArray[np.uint8], pts: int) -> None:
        """Append a mask, uint8 (height, width), shown from `pts` × time base on; times must ascend.

        Raises ValueError for another shape, dtype or order, or a time beyond 136 years.
        """
        width, height = self._video.size
        if mask.dtype != np.uint8 or mask.shape != (height, width):
            raise ValueError(f"the masks are uint8 {(height, width)}, not {mask.dtype} {mask.shape}")
        if self._waiting is not None and pts <= self._waiting[1]:
            raise ValueError(f"time {pts} does not come after {self._waiting[1]}")
        if abs(pts * self._video.time_base) > _LONGEST_SECONDS or abs(pts) >= 2**63:
            raise ValueError(f"time {pts} × {self._video.time_base} s is too far from 0")
        mask = np.ascontiguousarray(mask)
        frame = av.VideoFrame.from_ndarray(mask, format="gray")
        frame.pts, frame.time_base = pts, self._video.time_base
        [packet] = self._stream.encode(frame)
        self._mux_waiting(last=False)
        self._waiting = packet, pts, zlib.crc32(mask.data)

    def _mux_waiting(self, *, last: bool) -> None:
        """Write the frame that was kept back until it was known whether another follows."""
        if self._waiting is not None:
            packet, pts, pixels = self._waiting
            checksum = _checksum(self._video, self._number, last, pts, pixels)
            _add_to(packet, _ADDITION.pack(_CODEC_SPECIFIC, self._number, last, pts, checksum))
            self._container.mux(packet)
            self._number += 1
            self._waiting = None

    def close(self) -> None:
        """Finish the file; without it, the file cannot be read, and neither without a mask."""
        try:
            self._mux_waiting(last=True)
            self._container.close()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # In this order the container is left without its end.
            self._file.close()
            self._container.close()


def read_header(path: Path | str) -> MaskVideo:
    """The size and time base of a mask video; raises as `read_masks` does."""
    with _open(path, threads=1) as (_, _, video):
        return video


def read_masks(path: Path | str, *, threads: int = 1) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Each frame's time, in units of the header's time base, and its mask, uint8 (height, width), in order.

    Raises InvalidMedia for what is no finished mask video with at least one frame, and where a frame is damaged or
    missing; those before it have been given then. OSError if the path cannot be opened.
    """
    with _open(path, threads=threads) as (container, stream, video):
        packets = container.demux(stream)
        expected, last = 0, False
        while True:
            with _raising_invalid_media():
                packet = next(packets)
                if not packet.size:
                    break
                number, last, pts, mask = _read_frame(packet, video)
                if number != expected:
                    raise InvalidMedia(f"Frame {expected} of the mask video is missing")
                # What follows a last frame is the next part, counted from 0 again.
                expected = 0 if last else number + 1
            yield pts, mask
        if not last:
            raise InvalidMedia("The end of the mask video is missing")


@contextmanager
def _open(path: Path | str, *, threads: int) -> Iterator[tuple[InputContainer, VideoStream, MaskVideo]]:
    with Path(path).open("rb") as file:
        with _raising_invalid_media():
            # The one container, as FFmpeg's guess could be any of hundreds.
            container = av.open(file, "r", format="matroska", metadata_errors="replace")
        with container:
            with _raising_invalid_media():
                [stream] = container.streams
                if not isinstance(stream, VideoStream) or stream.name != "ffv1" or stream.pix_fmt != "gray":
                    raise InvalidMedia("A mask video is one stream of gray FFV1, and this file is not")
                video = MaskVideo((stream.width, stream.height), Fraction(stream.metadata[_TIME_BASE_TAG]))
                stream.codec_context.thread_type = av.codec.context.ThreadType.SLICE
                stream.codec_context.thread_count = threads
            yield container, stream, video


@contextmanager
def _raising_invalid_media() -> Iterator[None]:
    try:
        yield
    except (InvalidMedia, OutOfMemory):
        raise
    except MemoryError as error:
        raise OutOfMemory("Not enough memory to read a mask video") from error
    except Exception as error:
        raise InvalidMedia(_DAMAGED) from error


def _read_frame(packet: "Packet[VideoStream]", video: MaskVideo) -> tuple[int, bool, int, NDArray[np.uint8]]:
    """Number, whether it is the last one written, time, and mask."""
    [frame] = packet.decode()
    mask = np.ascontiguousarray(frame.to_ndarray(), dtype=np.uint8)
    _, number, last, pts, checksum = _ADDITION.unpack(bytes(packet.get_sidedata(_SIDE_DATA)))
    if mask.shape != video.size[::-1] or checksum != _checksum(video, number, last, pts, zlib.crc32(mask.data)):
        raise InvalidMedia("A frame of the mask video is damaged")
    return number, last, pts, mask


def _checksum(video: MaskVideo, number: int, last: bool, pts: int, pixels: int) -> int:
    """`pixels` is their own checksum."""
    return zlib.crc32(_CHECKED.pack(*video.size, *video.time_base.as_integer_ratio(), number, last, pts), pixels)


def _add_to(packet: "Packet[VideoStream]", addition: bytes) -> None:
    kind = packet_sidedata_type_from_literal(_SIDE_DATA)
    side_data = PacketSideData(kind, len(addition))  # type: ignore[call-arg]  # missing in PyAV's stubs
    side_data.update(addition)
    side_data.to_packet(packet, move=True)  # type: ignore[arg-type]  # a packet of any stream, say the stubs


def _count_slices(width: int, height: int) -> int:
    """Into how many rectangles a frame is cut: few, as each costs bytes, but the encoder takes none of 2**24 pixels."""
    if min(width, height) == 1:
        return 1
    return 4 if width * height <= 2**25 else 16
