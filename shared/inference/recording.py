"""What a recording holds, found by reading its packets once: when each frame is shown, and where decoding can begin.

Headers lie and recordings are cut short, so every packet is counted, while hardly a frame is decoded. The index is
small and can be stored; chunks.py plans with it, frames.py decodes by it.
"""

import io
import json
import math
import re
from array import array
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Self

import av
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shared.inference.colors import Colors, describe_colors
from shared.inference.containers import (
    OpenRecording,
    Source,
    codec_of,
    open_recording,
    raising_invalid_media,
)
from shared.inference.errors import InvalidMedia, MediaLimit
from shared.inference.orientation import UPRIGHT, Orientation, read_orientation
from shared.inference.timestamps import (
    MISSING,
    PacketTable,
    Times,
    fill_decoding_times,
    fill_from_reordering,
    join_parts,
    order_frames,
    typical_step,
)

_TRIED_PACKETS = 512
"""How many packets may pass until the first frame can be decoded."""
_REORDERS_ITSELF = ("h264", "hevc")
"""Codecs whose order of display does not follow from which frames are B-frames."""


@dataclass(frozen=True)
class Limits:
    """What an installation takes: pixels per frame, frames, and seconds from the first frame to the last."""

    max_pixels: int
    max_frames: int
    max_seconds: float


@dataclass(frozen=True, eq=False)
class Keyframes:
    """Where decoding can begin, in order: arrays (K,) int64.

    `number` counts packets from 0 in the order of decoding, `pts` and `dts` are in ticks (`dts` as the container tells
    it, to seek by), `position` is the byte in the file, -1 where unknown, `size` the packet's bytes.
    """

    number: NDArray[np.int64]
    pts: Times
    dts: Times
    position: NDArray[np.int64]
    size: NDArray[np.int64]


@dataclass(frozen=True)
class Header:
    """What holds for all frames of a recording.

    `size` is (width, height) as stored, `upright_size` as it is to be seen; pixels are never stretched, whatever
    `sample_aspect_ratio` says. `declared_seconds` is what the container says, None where it says nothing, and
    `seconds` what was found. `warnings` are sentences for the person who sent the recording.
    """

    format: str
    codec: str
    stream: int
    time_base: Fraction
    size: tuple[int, int]
    upright_size: tuple[int, int]
    orientation: Orientation
    sample_aspect_ratio: Fraction
    pixel_format: str
    colors: Colors
    seconds: float
    declared_seconds: float | None
    max_pixels: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Index:
    """A recording's header, and per frame, in the order of showing, its time and its packet: arrays (F,) int64.

    `times` are presentation timestamps in ticks of the header's time base, strictly ascending; `packets` are numbers of
    packets in the order of decoding.
    """

    header: Header
    times: Times
    packets: NDArray[np.int64]
    keyframes: Keyframes

    def keyframe_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which keyframe decoding must begin at for each of the frames, int64; -1 where only the file's beginning does.

        A frame that is decoded after a keyframe and shown before it may be made from frames before that keyframe.
        """
        rows = np.searchsorted(self.keyframes.number, self.packets[positions], side="right") - 1
        leading = (rows >= 0) & (self.times[positions] < self.keyframes.pts[np.maximum(rows, 0)])
        return rows - leading

    def to_bytes(self) -> bytes:
        """A form to be stored, about a byte per frame; `from_bytes` reads it."""
        header = asdict(self.header) | {
            "time_base": str(self.header.time_base),
            "sample_aspect_ratio": str(self.header.sample_aspect_ratio),
        }
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            # Differences, of which most are alike.
            times=np.diff(self.times, prepend=0),
            packets=np.diff(self.packets, prepend=0),
            **{name: np.diff(values, prepend=0) for name, values in vars(self.keyframes).items()},
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The index that `to_bytes` wrote; raises ValueError for anything else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            header = json.loads(arrays.pop("header").tobytes())
            columns = {name: np.cumsum(values) for name, values in arrays.items()}
            return cls(_read_header(header), columns.pop("times"), columns.pop("packets"), Keyframes(**columns))
        except Exception as error:
            raise ValueError("these bytes are no stored index") from error


def _read_header(stored: dict[str, Any]) -> Header:
    return Header(
        **stored
        | {
            "time_base": Fraction(stored["time_base"]),
            "sample_aspect_ratio": Fraction(stored["sample_aspect_ratio"]),
            "size": tuple(stored["size"]),
            "upright_size": tuple(stored["upright_size"]),
            "orientation": Orientation(**stored["orientation"]),
            "colors": Colors(**stored["colors"]),
            "warnings": tuple(stored["warnings"]),
        }
    )


def probe(source: Source, *, limits: Limits) -> Index:
    """Read all packets of the best video stream and decode its first sound frame.

    Raises InvalidMedia for what is no recording that can be read, MediaLimit beyond `limits`, and what `source` itself
    raises. A recording that is cut short gives the frames that are there, and a warning.
    """
    with open_recording(source, max_pixels=limits.max_pixels) as recording:
        packets = _Packets(limits)
        with raising_invalid_media(recording.file):
            first = packets.read(recording)
        if first is None:
            raise InvalidMedia("No frame of the recording can be decoded")
        stream = recording.stream
        pts, warnings = _complete_times(packets, stream, source, recording.format)
        table = PacketTable(pts, packets.table().dts, packets.table().key, packets.table().shown)
        pts, joined = join_parts(table)
        times, numbers, doubled = order_frames(PacketTable(pts, table.dts, table.key, table.shown))
        if not len(times):
            raise InvalidMedia("The recording has no frames")
        if joined:
            warnings.append(f"The recording's clock goes back {joined} times; what follows was moved to the end")
        if doubled:
            warnings.append(f"{doubled} frames have the time of another one; the last of each is taken")
        header = _describe(recording, first, times, limits, tuple([*packets.warnings, *warnings]))
        rows = np.flatnonzero(table.key)
        keyframes = Keyframes(
            rows,
            pts[rows],
            table.dts[rows],
            np.frombuffer(packets.positions, np.int64).copy(),
            np.frombuffer(packets.sizes, np.int64).copy(),
        )
        return Index(header, times, numbers, keyframes)


@dataclass
class _Packets:
    """What the pass over the packets collects; arrays of the standard library, as they grow without moving much."""

    limits: Limits
    pts: "array[int]" = field(default_factory=lambda: array("q"))
    dts: "array[int]" = field(default_factory=lambda: array("q"))
    key: bytearray = field(default_factory=bytearray)
    shown: bytearray = field(default_factory=bytearray)
    positions: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    warnings: list[str] = field(default_factory=list)

    def read(self, recording: OpenRecording) -> VideoFrame | None:
        """Collect every packet; the first frame that can be decoded."""
        frame: VideoFrame | None = None
        corrupt = 0
        try:
            for packet in recording.container.demux(recording.stream):
                # An empty packet stands for "as before" in AVI, and for the end of the stream in PyAV.
                if packet.size:
                    self._add(packet, recording.stream)
                    corrupt = corrupt + 1 if packet.is_corrupt else 0
                if frame is None and len(self.pts) <= _TRIED_PACKETS and any(self.key):
                    frame = _try_to_decode(packet)
                    if frame is not None:
                        _check_size(frame, self.limits)
        except FFmpegError:
            recording.file.raise_own_error()
            if frame is None:
                raise
            self.warnings.append("The recording is damaged: it cannot be read to its end")
        recording.file.raise_own_error()
        self._drop_last(corrupt)
        return frame

    def _add(self, packet: "Packet[VideoStream]", stream: VideoStream) -> None:
        if len(self.pts) >= self.limits.max_frames:
            raise MediaLimit(f"The recording has more than the {self.limits.max_frames} frames that are taken")
        self.pts.append(MISSING if packet.pts is None else packet.pts)
        self.dts.append(MISSING if packet.dts is None else packet.dts)
        self.key.append(packet.is_keyframe)
        self.shown.append(not packet.is_discard and not _is_hidden(packet, stream.codec_context.name))
        if packet.is_keyframe:
            self.positions.append(-1 if packet.pos is None else packet.pos)
            self.sizes.append(packet.size)

    def _drop_last(self, count: int) -> None:
        """Leave out what the end of the file cut in two."""
        if count:
            keys = sum(self.key[-count:])
            for values in (self.pts, self.dts, self.key, self.shown):
                del values[-count:]
            if keys:
                del self.positions[-keys:], self.sizes[-keys:]
            self.warnings.append("The recording is cut short: its last frame is incomplete")

    def table(self) -> PacketTable:
        return PacketTable(
            np.frombuffer(self.pts, np.int64),
            np.frombuffer(self.dts, np.int64),
            np.frombuffer(self.key, np.bool_),
            np.frombuffer(self.shown, np.bool_),
        )


def _try_to_decode(packet: "Packet[VideoStream]") -> VideoFrame | None:
    try:
        frames = packet.decode()
    except FFmpegError:
        return None
    return next((frame for frame in frames if not frame.is_corrupt), None)


def _check_size(frame: VideoFrame, limits: Limits) -> None:
    if frame.width * frame.height > limits.max_pixels:
        raise MediaLimit(
            f"The recording has {frame.width}×{frame.height} pixels; at most {limits.max_pixels} are taken"
        )


def _is_hidden(packet: "Packet[VideoStream]", codec: str) -> bool:
    """Whether a packet of VP8 or VP9 holds a picture that is never shown, but only made others from."""
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] & 0x10
    if codec == "vp9" and data[-1] & 0xE0 != 0xC0:
        # Profile 3 has one bit more before those that say "shown before" and "shown".
        late = data[0] & 0x30 == 0x30
        shown_before, shown = (0x04, 0x01) if late else (0x08, 0x02)
        return not data[0] & (shown_before | shown)
    return False


def _complete_times(packets: _Packets, stream: VideoStream, source: Source, name: str) -> tuple[Times, list[str]]:
    table = packets.table()
    if not (table.pts == MISSING).any():
        return table.pts, []
    dts = fill_decoding_times(table.dts, table.pts)
    if stream.codec_context.name not in _REORDERS_ITSELF:
        return fill_from_reordering(table.pts, dts), []
    warning = f"The container ({name}) does not say when frames are shown; it was told from their order"
    if not stream.codec_context.has_b_frames:
        return np.where(table.pts == MISSING, dts, table.pts), [warning]
    return _order_by_decoding(source, stream, packets, dts), [warning]


def _order_by_decoding(source: Source, stream: VideoStream, packets: _Packets, dts: Times) -> Times:
    """Times of H.264 and HEVC in a container that has only the decoder's: all is decoded, to see the order."""
    order: list[int] = []
    with open_recording(source, max_pixels=packets.limits.max_pixels, number=stream.index) as recording:
        number = 0
        for packet in recording.container.demux(recording.stream):
            if packet.size:
                packet.pts = packet.dts = number
                number += 1
            try:
                order.extend(frame.pts for frame in packet.decode() if frame.pts is not None)
            except FFmpegError:
                recording.file.raise_own_error()
    rank = np.full(len(dts), -1, np.int64)
    rank[order] = np.arange(len(order))
    # What cannot be decoded keeps a place: the one that it has in the order of decoding.
    lost = np.flatnonzero(rank < 0)
    places = np.argsort(np.concatenate([np.asarray(order, np.int64), lost]) if len(lost) == len(dts) else rank)
    if len(lost):
        found = np.asarray(order, np.int64)
        places = np.insert(found, np.searchsorted(np.maximum.accumulate(found), lost), lost)
    pts = np.empty(len(dts), np.int64)
    pts[places] = np.sort(dts)
    return pts


def _describe(
    recording: OpenRecording, first: VideoFrame, times: Times, limits: Limits, warnings: tuple[str, ...]
) -> Header:
    stream = recording.stream
    if stream.time_base is None or stream.time_base <= 0:
        raise InvalidMedia("The recording has no clock")
    step = typical_step(times)
    seconds = float((int(times[-1]) - int(times[0]) + step) * stream.time_base)
    if seconds > limits.max_seconds:
        raise MediaLimit(f"The recording lasts {seconds:.0f} s; at most {limits.max_seconds:.0f} s are taken")
    declared = _declared_seconds(recording)
    notes = list(warnings)
    # A last frame may last longer than the others, and containers round.
    tolerance = max(0.1, 0.01 * seconds, float(2 * step * stream.time_base))
    if declared is not None and declared > seconds + tolerance:
        notes.append(
            f"The recording is cut short: it declares {declared:.3f} s, and {len(times)} frames ({seconds:.3f} s) are there"
        )
    elif declared is not None and declared < seconds - tolerance:
        notes.append(f"The recording lasts longer than it declares: {seconds:.3f} s, not {declared:.3f} s")
    orientation, note = read_orientation(first)
    colors, more = describe_colors(first)
    notes += note + more
    size = first.width, first.height
    return Header(
        format=recording.format,
        codec=codec_of(stream) or stream.codec_context.name,
        stream=stream.index,
        time_base=stream.time_base,
        size=size,
        upright_size=orientation.turn_size(size),
        orientation=orientation,
        sample_aspect_ratio=stream.sample_aspect_ratio or Fraction(1),
        pixel_format=first.format.name,
        colors=colors,
        seconds=seconds,
        declared_seconds=declared,
        max_pixels=limits.max_pixels,
        warnings=tuple(notes),
    )


def _declared_seconds(recording: OpenRecording) -> float | None:
    """What the header says of the stream; None where FFmpeg would have to estimate."""
    stream = recording.stream
    if recording.format in ("mpegts", "mpeg"):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # Matroska has it as a tag of the stream; the container's own also covers sound, which may go on for longer.
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    seconds = recording.container.duration
    return None if seconds is None else seconds / av.time_base
