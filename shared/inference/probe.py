"""Finding out what a recording holds, by reading its packets once.

Headers lie and recordings are cut short, so every packet is counted, while hardly a frame is decoded.
"""

import itertools
import re
from array import array
from dataclasses import dataclass, field, replace
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from shared.inference.bitstreams import EMPTY_BYTES, Entry, classify_keyframe, is_hidden, read_mpeg_picture
from shared.inference.colors import describe_colors
from shared.inference.containers import OpenRecording, Source, codec_of, open_recording, raising_invalid_media
from shared.inference.continuity import Continuity
from shared.inference.errors import InvalidMedia, MediaLimit
from shared.inference.orientation import read_orientation
from shared.inference.recording import Header, Index, Keyframes, Limits
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
_TOLD_BY_KIND = ("mpeg1video", "mpeg2video", "mpeg4")
"""Codecs whose order of showing follows from which frames are B-frames."""
_REORDERS_FREELY = ("h264", "hevc")
"""Codecs whose order of showing does not follow from which frames are B-frames."""


def probe(source: Source, *, limits: Limits) -> Index:
    """Read all packets of the best video stream and decode its first sound frame.

    Raises InvalidMedia for what is no recording that can be read, MediaLimit beyond `limits`, and what `source` itself
    raises. A recording that is cut short gives the frames that are there, and a warning.
    """
    with open_recording(source, max_pixels=limits.max_pixels) as recording, raising_invalid_media(recording.file):
        packets = _Packets(limits)
        first = packets.read(recording)
        if first is None:
            raise InvalidMedia("No frame of the recording can be decoded")
        warnings = packets.warnings
        pts, notes = _complete_times(packets, recording, source)
        warnings += notes
        pts, joined = join_parts(replace(packets.table(), pts=pts))
        if joined:
            warnings.append(f"The recording's clock goes back {joined} times; what follows was moved to the end")
        times, numbers, doubled = order_frames(replace(packets.table(), pts=pts))
        if not len(times):
            raise InvalidMedia("The recording has no frames")
        if doubled:
            warnings.append(f"{doubled} frames have the time of another one; the last of each is taken")
        return Index(_describe(recording, first, times, limits, warnings), times, numbers, packets.keyframes(pts))


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
    clean: "array[int]" = field(default_factory=lambda: array("q"))
    unreadable: "array[int]" = field(default_factory=lambda: array("q"))
    warnings: list[str] = field(default_factory=list)

    def read(self, recording: OpenRecording) -> VideoFrame | None:
        """Collect every packet; the first frame that can be decoded."""
        frame: VideoFrame | None = None
        corrupt = 0
        continuity = Continuity(recording.stream.codec_context)
        try:
            for packet in recording.container.demux(recording.stream):
                # An empty packet stands for "as before" in AVI, and for the end of the stream in PyAV.
                if packet.size:
                    if continuity.has_fields:
                        continuity.add(packet, keyframe=packet.is_keyframe)
                    self._add(packet, recording.stream, second_field=continuity.is_second_field)
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

    def _add(self, packet: "Packet[VideoStream]", stream: VideoStream, *, second_field: bool) -> None:
        if len(self.pts) >= self.limits.max_frames:
            raise MediaLimit(f"The recording has more than the {self.limits.max_frames} frames that are taken")
        # The second field of a frame is told no time, and needs none.
        pts = self.pts[-1] if second_field else packet.pts
        self.pts.append(MISSING if pts is None else pts)
        self.dts.append(MISSING if packet.dts is None else packet.dts)
        codec = stream.codec_context
        self.shown.append(not second_field and not packet.is_discard and not is_hidden(packet, codec.name))
        entry = Entry.CLEAN if packet.is_keyframe else Entry.NONE
        if second_field:
            entry = Entry.NONE
        elif packet.is_keyframe and codec.name == "h264":
            entry = classify_keyframe(packet, codec.extradata)
        if codec.name in _TOLD_BY_KIND and packet.size > EMPTY_BYTES and read_mpeg_picture(packet, codec.name) is None:
            self.unreadable.append(len(self.key))
            entry = Entry.NONE
        self.key.append(entry is not Entry.NONE)
        if entry is not Entry.NONE:
            self.positions.append(-1 if packet.pos is None else packet.pos)
            self.sizes.append(packet.size)
            self.clean.append(entry is Entry.CLEAN)

    def _drop_last(self, count: int) -> None:
        """Leave out what the end of the file cut in two."""
        if count:
            keys = sum(self.key[-count:])
            for values in (self.pts, self.dts, self.key, self.shown):
                del values[-count:]
            if keys:
                del self.positions[-keys:], self.sizes[-keys:], self.clean[-keys:]
            self.warnings.append("The recording is cut short: its last frame is incomplete")

    def keyframes(self, pts: Times) -> Keyframes:
        rows = np.flatnonzero(self.table().key)
        return Keyframes(
            number=rows,
            pts=pts[rows],
            dts=self.table().dts[rows],
            position=np.array(self.positions, np.int64),
            size=np.array(self.sizes, np.int64),
            clean=np.array(self.clean, np.int64),
        )

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


def _complete_times(packets: _Packets, recording: OpenRecording, source: Source) -> tuple[Times, list[str]]:
    table, codec = packets.table(), recording.stream.codec_context
    if not (table.pts == MISSING).any():
        return table.pts, []
    dts = fill_decoding_times(table.dts, table.pts)
    if codec.name not in _REORDERS_FREELY:
        return fill_from_reordering(table.pts, dts, np.array(packets.unreadable, np.int64)), []
    if codec.has_b_frames:
        pts = _order_by_decoding(source, recording, dts, packets.limits)
    else:
        pts = np.where(table.pts == MISSING, dts, table.pts)
    return pts, [f"The container ({recording.format}) does not say when frames are shown; their order told it"]


def _order_by_decoding(source: Source, probed: OpenRecording, dts: Times, limits: Limits) -> Times:
    """Times of H.264 and HEVC in a container that has only the decoder's: all is decoded, to see the order."""
    shown: dict[int, None] = {}
    with open_recording(source, max_pixels=limits.max_pixels, number=probed.stream.index) as recording:
        # Damaged frames are welcome here: they have their place too.
        recording.stream.codec_context.options.pop("err_detect", None)
        packets = (packet for packet in recording.container.demux(recording.stream) if packet.size)
        continuity, unreadable = Continuity(recording.stream.codec_context), False
        for number, packet in enumerate(itertools.islice(packets, len(dts))):
            continuity.add(packet, keyframe=packet.is_keyframe)
            if not continuity.is_readable:
                unreadable = True
                continue
            # A lost keyframe: what is decoded after it must not be sorted among what was before.
            if unreadable and continuity.is_restarted:
                shown.update(_decode_numbers(recording, None))
                recording.stream.codec_context.flush_buffers()
            unreadable = False
            packet.pts = packet.dts = number
            shown.update(_decode_numbers(recording, packet))
        shown.update(_decode_numbers(recording, None))
    order = np.fromiter(shown, np.int64, len(shown))
    # What cannot be decoded has about the place that it has in the order of decoding.
    lost = np.setdiff1d(np.arange(len(dts)), order)
    order = np.insert(order, np.searchsorted(np.maximum.accumulate(order), lost), lost)
    pts = np.empty(len(dts), np.int64)
    pts[order] = np.sort(dts)
    return pts


def _decode_numbers(recording: OpenRecording, packet: "Packet[VideoStream] | None") -> dict[int, None]:
    try:
        frames = recording.stream.codec_context.decode(packet)
    except FFmpegError:
        recording.file.raise_own_error()
        return {}
    return {frame.pts: None for frame in frames if frame.pts is not None}


def _describe(recording: OpenRecording, first: VideoFrame, times: Times, limits: Limits, warnings: list[str]) -> Header:
    stream = recording.stream
    if stream.time_base is None or stream.time_base <= 0:
        raise InvalidMedia("The recording has no clock")
    step = typical_step(times)
    seconds = float((int(times[-1]) - int(times[0]) + step) * stream.time_base)
    if seconds > limits.max_seconds:
        raise MediaLimit(f"The recording lasts {seconds:.0f} s; at most {limits.max_seconds:.0f} s are taken")
    declared = _declared_seconds(recording)
    # A last frame may last longer than the others, and containers round.
    tolerance = max(0.1, 0.01 * seconds, float(2 * step * stream.time_base))
    if declared is not None and declared > seconds + tolerance:
        warnings.append(
            f"The recording is cut short: it declares {declared:.3f} s, "
            f"and {len(times)} frames ({seconds:.3f} s) are there"
        )
    elif declared is not None and declared < seconds - tolerance:
        warnings.append(f"The recording lasts longer than it declares: {seconds:.3f} s, not {declared:.3f} s")
    orientation, note = read_orientation(first)
    colors, more = describe_colors(first)
    warnings += note + more
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
        warnings=tuple(warnings),
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
