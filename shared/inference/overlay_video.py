"""The overlay of a recording for people: H.264 in MP4 that browsers play, the data being the masks.

Every part begins with a keyframe and no frame looks ahead of itself, so what was written apart is joined by copying
packets. A player's clock begins at the first picture, whatever the source's clock said then: cameras begin at the day's
seconds, at hours, or below 0, and a player would show nothing until then, or lose the beginning. The source's first
time is kept in the file.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.codec.context import Flags
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shared.inference.errors import InvalidMedia, OutOfMemory

LONGEST_SIDE = 1920
"""Pixels; larger pictures are scaled down to it, since this is to be looked at, over a network and on any screen."""
KEYFRAME_SECONDS = 2
"""The first picture so long after a keyframe is the next one: where a player can jump to."""

_OPTIONS = {
    # Half the bytes of "superfast" in about its time, and "faster" takes half as long again for the same bytes: 20 ms
    # for a picture of 1920×1080 on one core, 14 ms on two.
    "preset": "veryfast",
    "crf": "23",
    "profile": "high",
    # Nothing refers to what comes later, so that times ascend as stored and any keyframe is a place to join.
    "bf": "0",
    # Keyframes are only those asked for, by time: chunks and rates of pictures differ.
    "g": "1000000",
    "sc_threshold": "0",
    "forced-idr": "1",
}
_THREADS = 4
"""Fixed, as the encoder's choices depend on it."""
# Otherwise rounded as suits the processor: 2 ms less for a picture of 1920×1080, and other bytes on other machines.
_CONVERTING = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_SCALING = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_NOMINAL_RATE = 60
"""What the encoder thinks the rate is where it must have one, to name a level that devices know; times are their own.
"""
_FINEST_TIMESCALE = 1_000_000
_USUAL_TIMESCALE = 90_000
_LONGEST_TICKS = 2**31 - 1
"""How long the format lets a picture stay: 6.6 hours at 90 kHz."""
_ONLY_PICTURE_SECONDS = Fraction(1, 25)
_DAMAGED = "The overlay video is damaged or no overlay video"
_TIME_BASE_TAG = "maskline_time_base"
_FIRST_PTS_TAG = "maskline_first_pts"


@dataclass(frozen=True)
class OverlayVideo:
    """(width, height) of the pictures as stored, the seconds that a time of the source counts in, and the first one."""

    size: tuple[int, int]
    time_base: Fraction
    first_pts: int

    @property
    def timescale(self) -> int:
        """Ticks per second of the file: exact unless the time base's denominator is beyond 1 MHz, then 90 kHz."""
        finest = self.time_base.denominator
        return finest if finest <= _FINEST_TIMESCALE else _USUAL_TIMESCALE

    def tick(self, pts: int) -> int:
        """When the picture of a source time is shown, in ticks from the first one."""
        per_unit = self.time_base * self.timescale
        return round(pts * per_unit) - round(self.first_pts * per_unit)


class OverlayVideoWriter:
    """Writes pictures one after the other; the same pictures give the same bytes.

    A context manager: left by an exception, it takes the file away.
    """

    def __init__(self, path: Path, size: tuple[int, int], time_base: Fraction) -> None:
        """Begin a file of pictures of `size` (width, height), upright.

        Sides above LONGEST_SIDE are scaled down to it, aspect kept to the pixel. The codec takes even sides alone: an
        odd one gets one more column or row, equal to the last, so that no pixel moves or is lost.
        Raises ValueError for an empty size or a time base that is not positive or beyond 31 bits.
        """
        if min(size) < 1:
            raise ValueError(f"there are no pictures of {size[0]}×{size[1]}")
        if time_base <= 0 or max(time_base.as_integer_ratio()) >= 2**31:
            raise ValueError(f"{time_base} s is no time base")
        self._path = path
        self._size = size
        self._stored = _fit(size)
        self._time_base = time_base
        self._reformatter = VideoReformatter()
        self._video: OverlayVideo | None = None
        self._tick = self._keyframe = 0
        self._container = _create_container(path, OverlayVideo(self._stored, time_base, 0).timescale)

    def write(self, picture: NDArray[np.uint8], pts: int) -> None:
        """Append a picture, uint8 RGB (height, width, 3), shown from `pts` × time base on; times must ascend.

        Raises ValueError for another shape, dtype or order, or a picture that would stay longer than 2**31 ticks.
        """
        width, height = self._size
        if picture.dtype != np.uint8 or picture.shape != (height, width, 3):
            raise ValueError(f"the pictures are uint8 {(height, width, 3)}, not {picture.dtype} {picture.shape}")
        first = self._video is None
        if self._video is None:
            self._video = OverlayVideo(self._stored, self._time_base, pts)
            self._stream = self._add_stream(self._video)
            self._track = _Track(self._container, self._video)
            self._pts = pts
        elif pts <= self._pts:
            raise ValueError(f"time {pts} does not come after {self._pts}")
        # Where the file's clock is the coarser one, neighbours may fall on one tick.
        tick = 0 if first else max(self._video.tick(pts), self._tick + 1)
        if tick - self._tick > _LONGEST_TICKS:
            raise ValueError(f"no picture stays from {self._pts} to {pts}, at {self._video.timescale} ticks a second")
        frame = self._reformat(picture)
        frame.pts, frame.time_base = tick, Fraction(1, self._video.timescale)
        if first or tick - self._keyframe >= KEYFRAME_SECONDS * self._video.timescale:
            frame.pict_type = PictureType.I
            self._keyframe = tick
        self._pts, self._tick = pts, tick
        for packet in self._stream.encode(frame):
            self._track.append(packet, _read_time(packet))

    def _add_stream(self, video: OverlayVideo) -> VideoStream:
        _describe(self._container, video)
        width, height = video.size
        stream = self._container.add_stream("libx264", rate=_NOMINAL_RATE, options=_OPTIONS, width=width, height=height)
        stream.time_base = Fraction(1, video.timescale)
        context = stream.codec_context
        context.time_base = Fraction(1, video.timescale)
        context.pix_fmt = "yuv420p"
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.thread_count = _THREADS
        context.flags |= Flags.bitexact
        return stream

    def _reformat(self, picture: NDArray[np.uint8]) -> av.VideoFrame:
        width, height = self._stored
        scaled = max(self._size) > LONGEST_SIDE
        if not scaled and self._stored != self._size:
            picture = np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)), "edge")
        return self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
            width,
            height,
            "yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SCALING if scaled else _CONVERTING,
        )

    def close(self) -> None:
        """Finish the file; without it, it cannot be read. Raises ValueError if there is no picture."""
        if self._video is None:
            raise ValueError("an overlay video has at least one picture")
        for packet in self._stream.encode(None):
            self._track.append(packet, _read_time(packet))
        self._track.finish()
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = False
        try:
            if kind is None:
                self.close()
                finished = True
            else:
                self._container.close()
        finally:
            if not finished:
                self._path.unlink(missing_ok=True)


class _Track:
    """Writes packets, each when it is known how long its picture stays: the last one as long as the one before."""

    def __init__(self, container: OutputContainer, video: OverlayVideo) -> None:
        self._container = container
        self._waiting: Packet[VideoStream] | None = None
        self._interval = round(_ONLY_PICTURE_SECONDS * video.timescale)
        self.tick = -1

    def append(self, packet: "Packet[VideoStream]", tick: int) -> None:
        if self._waiting is not None:
            self._interval = tick - self.tick
            self._mux_waiting()
        self._waiting, self.tick = packet, tick

    def finish(self) -> None:
        self._mux_waiting()

    def _mux_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.pts = self._waiting.dts = self.tick
            self._waiting.duration = self._interval
            self._container.mux(self._waiting)
            self._waiting = None


def join_overlays(parts: Iterable[Path], out: Path) -> None:
    """Put overlay videos together in their order, copying packets, at the times of the source.

    A part may come into being when it is asked for and go when the next one is: one is open at a time. Memory holds
    the times of all pictures, some tens of bytes each. Pixels are not looked at: a flipped bit of them stays.
    Raises InvalidMedia naming the part (counted from 0) that is no finished overlay video, is cut short, differs in
    size or time base or codec header, or does not begin after the one before; OSError if a path cannot be opened;
    ValueError without parts. There is no `out` then.
    """
    joint: _Joint | None = None
    try:
        for number, path in enumerate(parts):
            try:
                with _open(path) as (part, stream, video):
                    joint = joint or _Joint(out, stream, video)
                    joint.append(part, stream, video)
            except InvalidMedia as error:
                raise InvalidMedia(f"Part {number} ({path.name}): {error}") from error
        if joint is None:
            raise ValueError("there are no parts to join")
        joint.track.finish()
        joint.container.close()
    except BaseException:
        if joint is not None:
            try:
                joint.container.close()
            finally:
                out.unlink(missing_ok=True)
        raise


class _Joint:
    """The video that parts are appended to, made like the first of them."""

    def __init__(self, out: Path, template: VideoStream, video: OverlayVideo) -> None:
        self._video = video
        self._codec_header = template.codec_context.extradata
        self.container = _create_container(out, video.timescale)
        _describe(self.container, video)
        self._stream = self.container.add_stream_from_template(template)
        self.track = _Track(self.container, video)

    def append(self, part: InputContainer, stream: VideoStream, video: OverlayVideo) -> None:
        if (video.size, video.time_base) != (self._video.size, self._video.time_base):
            raise InvalidMedia("Another size or time base than the parts before")
        if stream.codec_context.extradata != self._codec_header:
            raise InvalidMedia("Encoded in another way than the parts before")
        begin = self._video.tick(video.first_pts)
        if begin < 0:
            raise InvalidMedia(f"Time {video.first_pts} does not come after the parts before")
        for packet in _read_packets(part, stream):
            tick = begin + _read_time(packet)
            if tick <= self.track.tick:
                raise InvalidMedia(f"Time {video.first_pts} does not come after the parts before")
            packet.stream = self._stream
            self.track.append(packet, tick)


def read_header(path: Path) -> OverlayVideo:
    """What holds for all pictures; raises InvalidMedia for what is no overlay video, OSError if it cannot be opened."""
    with _open(path) as (_, _, video):
        return video


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream, OverlayVideo]]:
    with ExitStack() as closing:
        file = closing.enter_context(path.open("rb"))
        with _raising_invalid_media():
            container = closing.enter_context(av.open(file, "r", format="mp4"))
            [stream] = container.streams
            if not isinstance(stream, VideoStream) or stream.name != "h264":
                raise InvalidMedia("An overlay video is one stream of H.264, and this file is not")
            tags = container.metadata
            video = OverlayVideo(
                (stream.width, stream.height), Fraction(tags[_TIME_BASE_TAG]), int(tags[_FIRST_PTS_TAG])
            )
            if stream.time_base != Fraction(1, video.timescale):
                raise InvalidMedia("The overlay video counts time in another way than it says")
        yield container, stream, video


def _read_packets(container: InputContainer, stream: VideoStream) -> "Iterator[Packet[VideoStream]]":
    packets = container.demux(stream)
    count = 0
    while True:
        with _raising_invalid_media():
            packet = next(packets)
        if not packet.size:
            break
        if packet.is_corrupt or (count == 0 and not packet.is_keyframe):
            raise InvalidMedia(_DAMAGED)
        count += 1
        yield packet
    if count != stream.frames or not count:
        raise InvalidMedia(f"Of {stream.frames} pictures of the overlay video, {count} are there")


@contextmanager
def _raising_invalid_media() -> Iterator[None]:
    try:
        yield
    except InvalidMedia:
        raise
    except MemoryError as error:
        raise OutOfMemory("Not enough memory to read an overlay video") from error
    except Exception as error:
        raise InvalidMedia(_DAMAGED) from error


def _read_time(packet: "Packet[VideoStream]") -> int:
    if packet.pts is None:
        raise InvalidMedia(_DAMAGED)
    return packet.pts


def _create_container(path: Path, timescale: int) -> OutputContainer:
    options = {
        # What a player needs first stands first; and tags may have any name.
        "movflags": "faststart+use_metadata_tags",
        "video_track_timescale": str(timescale),
        # Times begin at 0, so there is nothing to edit.
        "use_editlist": "0",
        # No date, no version of the library.
        "fflags": "bitexact",
    }
    return av.open(path, "w", format="mp4", container_options=options)


def _describe(container: OutputContainer, video: OverlayVideo) -> None:
    container.metadata[_TIME_BASE_TAG] = str(video.time_base)
    container.metadata[_FIRST_PTS_TAG] = str(video.first_pts)


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    """The even sides that a picture is stored with."""
    width, height = size
    longest = max(size)
    if longest <= LONGEST_SIDE:
        return width + width % 2, height + height % 2
    wide, high = (max(2, 2 * round(Fraction(side * LONGEST_SIDE, 2 * longest))) for side in size)
    return wide, high
