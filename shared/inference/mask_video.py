"""The masks of a recording as one lossless video: FFV1 in Matroska, 8-bit gray, a class id per pixel.

Every frame stands alone and every writer makes the same codec header for a size, so what was written apart is joined
by copying packets, and one mask is read without those before it. What a frame carries beside its pixels is in
mask_stamps.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shared.inference import mask_stamps
from shared.inference.errors import InvalidMedia, OutOfMemory
from shared.inference.mask_stamps import MaskVideo, Stamp

__all__ = ["MaskVideo", "MaskVideoWriter", "join", "read_header", "read_mask", "read_masks"]

Source = Path | str | BinaryIO
"""A path, or an open binary file that can be sought: of a stored object, one that fetches what is asked for."""

_OPTIONS = {"level": "3", "g": "1", "coder": "rice", "context": "0", "slicecrc": "1"}
"""Chosen by bench/codecs.py, time first. Rice codes have runs, which label maps are made of: faster than the range
coder both ways, and smaller than it where outlines are clean, though larger where they are ragged. The larger context
costs time and bytes. Checksums of slices cost next to nothing; other readers than ours check them.
"""
_TIME_BASE_TAG = "TIME_BASE"
_LONGEST_SECONDS = 2**32
"""136 years to either side of 0: epoch times fit, and the container's clock is far from its end."""
_CLOCK = 1000
"""Matroska's own, in Hz, as FFmpeg writes it."""
_FARTHEST = 2**62
_DAMAGED = "The mask video is damaged or no mask video"
_DAMAGED_FRAME = "A frame of the mask video is damaged"

_StampedPacket = tuple["Packet[VideoStream]", Stamp, int]
"""With its checksum."""


class _PacketWriter:
    """Numbers packets and writes them, each when it is known whether another follows."""

    def __init__(self, container: OutputContainer, video: MaskVideo) -> None:
        self._container = container
        self._video = video
        self._waiting: tuple[Packet[VideoStream], Stamp, int] | None = None
        self._number = 0

    @property
    def last_pts(self) -> int | None:
        return self._waiting[1].pts if self._waiting else None

    def write(self, packet: "Packet[VideoStream]", stamp: Stamp, checksum: int) -> None:
        self._mux_waiting(last=False)
        self._waiting = packet, stamp, checksum

    def finish(self) -> None:
        self._mux_waiting(last=True)

    def _mux_waiting(self, *, last: bool) -> None:
        if self._waiting is not None:
            packet, was, checksum = self._waiting
            stamp = Stamp(self._number, last, was.pts)
            mask_stamps.attach(packet, stamp, mask_stamps.exchange(self._video, was, stamp, checksum))
            self._container.mux(packet)
            self._number += 1
            self._waiting = None


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
        # An own file, because closing it first leaves the container unfinished.
        self._file = Path(path).open("wb")  # noqa: SIM115
        try:
            self._container = _create_container(self._file)
            self._stream = self._add_stream(threads)
            self._container.start_encoding()
            self._packets = _PacketWriter(self._container, self._video)
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
        before = self._packets.last_pts
        if before is not None and pts <= before:
            raise ValueError(f"time {pts} does not come after {before}")
        if abs(pts * self._video.time_base) > _LONGEST_SECONDS or abs(pts) >= 2**63:
            raise ValueError(f"time {pts} × {self._video.time_base} s is too far from 0")
        mask = np.ascontiguousarray(mask)
        frame = av.VideoFrame.from_ndarray(mask, format="gray")
        frame.pts, frame.time_base = pts, self._video.time_base
        [packet] = self._stream.encode(frame)
        stamp = Stamp(0, False, pts)
        self._packets.write(packet, stamp, mask_stamps.compute_checksum(self._video, stamp, zlib.crc32(mask.data)))

    def close(self) -> None:
        """Finish the file; without it, the file cannot be read, and neither without a mask."""
        try:
            self._packets.finish()
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


def join(parts: Iterable[Path], out: Path) -> None:
    """Put mask videos together in their order, copying packets; the file is the one that a single writer makes.

    A part may come into being when it is asked for and go when the next one is: one is open at a time, and memory
    does not grow. Checked without decoding: the end and numbers of each part, the codec's checksums, the order of times
    across parts. A damaged time or checksum of a frame is copied as it is and shows when that frame is read.
    Raises InvalidMedia naming the part (counted from 0) that is no finished mask video, is damaged, differs in size
    or time base or codec header, or does not begin after the one before; OSError if a path cannot be opened; ValueError
    without parts. `out` then stays unfinished, which a reader notices.
    """
    with out.open("wb") as file:
        container = _create_container(file)
        joint: _Joint | None = None
        for number, path in enumerate(parts):
            try:
                with _open(path, threads=1) as (part, stream, video):
                    joint = joint or _Joint(container, stream, video)
                    joint.append(part, stream, video)
            except InvalidMedia as error:
                raise InvalidMedia(f"Part {number} ({path.name}): {error}") from error
        if joint is None:
            raise ValueError("there are no parts to join")
        joint.packets.finish()
        container.close()


class _Joint:
    """The video that parts are appended to, made like the first of them."""

    def __init__(self, container: OutputContainer, template: VideoStream, video: MaskVideo) -> None:
        self._stream = container.add_stream_from_template(template)
        self._stream.metadata[_TIME_BASE_TAG] = str(video.time_base)
        self._codec_header = template.codec_context.extradata
        self._video = video
        self.packets = _PacketWriter(container, video)

    def append(self, part: InputContainer, stream: VideoStream, video: MaskVideo) -> None:
        if video != self._video:
            raise InvalidMedia(f"{_describe(video)}, where the parts before have {_describe(self._video)}")
        if stream.codec_context.extradata != self._codec_header:
            raise InvalidMedia("Encoded in another way than the parts before")
        for packet, stamp, checksum in _read_packets(part, stream):
            if not mask_stamps.is_sound(bytes(packet)):
                raise InvalidMedia(_DAMAGED_FRAME)
            before = self.packets.last_pts
            if before is not None and stamp.pts <= before:
                raise InvalidMedia(f"Time {stamp.pts} does not come after {before}")
            # The exact time again: a part that began before 0 was moved by the container's clock, which has no such.
            packet.time_base = video.time_base
            packet.pts = packet.dts = stamp.pts
            packet.stream = self._stream
            self.packets.write(packet, stamp, checksum)


def _describe(video: MaskVideo) -> str:
    width, height = video.size
    return f"{width}×{height} pixels and a time base of {video.time_base} s"


def read_header(source: Source) -> MaskVideo:
    """The size and time base of a mask video; raises as `read_masks` does."""
    with _open(source, threads=1) as (_, _, video):
        return video


def read_masks(source: Source, *, threads: int = 1) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Each frame's time, in units of the header's time base, and its mask, uint8 (height, width), in order.

    Raises InvalidMedia for what is no finished mask video with at least one frame, and where a frame is damaged or
    missing; those before it have been given then. OSError if the path cannot be opened.
    """
    with _open(source, threads=threads) as (container, stream, video):
        for packet, stamp, checksum in _read_packets(container, stream):
            yield stamp.pts, _decode(packet, stamp, checksum, video)


def read_mask(
    source: Source, *, number: int | None = None, pts: int | None = None
) -> tuple[int, int, NDArray[np.uint8]]:
    """One frame, by its number from 0 or by its exact time: number, time, and mask, uint8 (height, width).

    Reads the file's beginning, its table of times and what lies where the frame is. Numbers are those of one writer
    or of `join`. Raises LookupError if there is no such frame, ValueError unless one of the two is given, and
    otherwise as `read_masks`.
    """
    if (number is None) == (pts is None):
        raise ValueError("a mask is read either by its number or by its time")
    with _open(source, threads=1) as (container, stream, video):
        with _raising_invalid_media():
            # The table of times is only read when something is sought.
            container.seek(0, stream=stream)
            if number is not None:
                found = _find(container, stream, number, key=lambda stamp: stamp.number, likely=number)
            elif pts is not None:
                milliseconds = min(max(round(pts * video.time_base * _CLOCK), -_FARTHEST), _FARTHEST)
                likely = stream.index_entries.search_timestamp(milliseconds)
                found = _find(container, stream, pts, key=lambda stamp: stamp.pts, likely=likely)
        if found is None:
            raise LookupError(f"the mask video has no frame of {f'number {number}' if pts is None else f'time {pts}'}")
        packet, stamp, checksum = found
        return stamp.number, stamp.pts, _decode(packet, stamp, checksum, video)


def _find(
    container: InputContainer, stream: VideoStream, wanted: int, *, key: Callable[[Stamp], int], likely: int
) -> _StampedPacket | None:
    """The packet whose stamp has the wanted key, or None; halves the table of times, beginning at a likely place."""
    low, high = 0, len(stream.index_entries) - 1
    place = min(max(likely, 0), high)
    while low <= high:
        found = next(_read_from(container, stream, place))
        if key(found[1]) == wanted:
            return found
        if key(found[1]) < wanted:
            low = place
        else:
            high = place - 1
        place = (low + high + 1) // 2
        if low == high:
            break
    # The table has one place for each millisecond, and reading moves it among the frames of that millisecond: so the
    # frame lies behind this place or behind one before it.
    for place in range(low, -1, -1):
        passed = False
        for found in _read_from(container, stream, place):
            if key(found[1]) == wanted:
                return found
            if key(found[1]) > wanted:
                break
            passed = True
        if passed:
            break
    return None


def _read_from(container: InputContainer, stream: VideoStream, place: int) -> Iterator[_StampedPacket]:
    container.seek(stream.index_entries[place].timestamp, stream=stream)
    for packet in container.demux(stream):
        if packet.size:
            yield _read_stamped(packet)


def _read_stamped(packet: "Packet[VideoStream]") -> _StampedPacket:
    return packet, *mask_stamps.read(packet)


@contextmanager
def _open(source: Source, *, threads: int) -> Iterator[tuple[InputContainer, VideoStream, MaskVideo]]:
    with ExitStack() as closing:
        file = closing.enter_context(Path(source).open("rb")) if isinstance(source, Path | str) else source
        with _raising_invalid_media():
            # The one container, as FFmpeg's guess could be any of hundreds. And no look at the frames for their rate:
            # they have none, and a range of a stored object is paid for.
            container = closing.enter_context(
                av.open(file, "r", format="matroska", options={"fpsprobesize": "0"}, metadata_errors="replace")
            )
            [stream] = container.streams
            if not isinstance(stream, VideoStream) or stream.name != "ffv1" or stream.pix_fmt != "gray":
                raise InvalidMedia("A mask video is one stream of gray FFV1, and this file is not")
            video = MaskVideo((stream.width, stream.height), Fraction(stream.metadata[_TIME_BASE_TAG]))
            stream.codec_context.thread_type = av.codec.context.ThreadType.SLICE
            stream.codec_context.thread_count = threads
        yield container, stream, video


def _create_container(file: BinaryIO) -> OutputContainer:
    # Bit-exact: no random ids, no version of the library, no date.
    return av.open(file, "w", format="matroska", container_options={"fflags": "bitexact"})


@contextmanager
def _raising_invalid_media() -> Iterator[None]:
    try:
        yield
    except (InvalidMedia, OutOfMemory):
        raise
    except MemoryError as error:
        raise OutOfMemory("Not enough memory to read a mask video") from error
    except Exception as error:
        # Some of FFmpeg's errors are OSError too; the others are those of the file itself, or of the store behind it.
        if isinstance(error, OSError) and not isinstance(error, av.FFmpegError):
            raise
        raise InvalidMedia(_DAMAGED) from error


def _read_packets(container: InputContainer, stream: VideoStream) -> Iterator[_StampedPacket]:
    """All of them; raises InvalidMedia where one is missing, and at the end unless it is the end."""
    packets = container.demux(stream)
    expected, last = 0, False
    while True:
        with _raising_invalid_media():
            packet = next(packets)
            if not packet.size:
                break
            found = _read_stamped(packet)
        stamp = found[1]
        if stamp.number != expected:
            raise InvalidMedia(f"Frame {expected} of the mask video is missing")
        # What follows a last frame is the next part, counted from 0 again, where others have joined the files.
        expected, last = (0 if stamp.last else stamp.number + 1), stamp.last
        yield found
    if not last:
        raise InvalidMedia("The end of the mask video is missing")


def _decode(packet: "Packet[VideoStream]", stamp: Stamp, checksum: int, video: MaskVideo) -> NDArray[np.uint8]:
    with _raising_invalid_media():
        [frame] = packet.decode()
        mask = np.ascontiguousarray(frame.to_ndarray(), dtype=np.uint8)
        pixels = zlib.crc32(mask.data)
    if mask.shape != video.size[::-1] or checksum != mask_stamps.compute_checksum(video, stamp, pixels):
        raise InvalidMedia(_DAMAGED_FRAME)
    return mask


def _count_slices(width: int, height: int) -> int:
    """Into how many rectangles a frame is cut: few, as each costs bytes, but the encoder takes none of 2**24 pixels."""
    if min(width, height) == 1:
        return 1
    return 4 if width * height <= 2**25 else 16
