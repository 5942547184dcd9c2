"""What each frame of a mask video carries beside its pixels, and what its packet tells without being decoded.

Matroska's clock has whole milliseconds in these files, so a frame has its exact time with it, and its number and a
checksum, because FFmpeg's decoder fills a damaged place from the frame before and tells nobody but its log.
"""

import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from av.packet import Packet, PacketSideData, packet_sidedata_type_from_literal
from av.video.stream import VideoStream

_SIDE_DATA: Final = "matroska_block_additional"
_CODEC_SPECIFIC = 1
"""The one kind of addition to a block that needs no declaration in the track, and the one that FFmpeg writes."""
_ADDITION = struct.Struct(">QI?qI")
"""Kind, number of the frame, whether it is the last one written, time, checksum."""
_CHECKED = struct.Struct(">IIiiI?q")
"""What the checksum covers after the pixels: width, height, time base, number, whether the last, time."""
_SLICE_END = struct.Struct(">BHBI")
"""Bytes of the slice before this, 24 bits of them; whether the encoder failed; checksum."""
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class MaskVideo:
    """What holds for all frames: (width, height), and the seconds that a time counts in."""

    size: tuple[int, int]
    time_base: Fraction


@dataclass(frozen=True)
class Stamp:
    """A frame's number from 0, whether it is the last one, and its time in units of the video's time base."""

    number: int
    last: bool
    pts: int


def compute_checksum(video: MaskVideo, stamp: Stamp, pixels: int) -> int:
    """`pixels` is their own checksum."""
    return zlib.crc32(
        _CHECKED.pack(*video.size, *video.time_base.as_integer_ratio(), stamp.number, stamp.last, stamp.pts), pixels
    )


def exchange(video: MaskVideo, was: Stamp, becomes: Stamp, checksum: int) -> int:
    """The checksum of the same pixels under another stamp.

    Checksums of this kind are linear, so the pixels need not be known; and what did not fit before does not fit after.
    """
    return checksum ^ compute_checksum(video, was, 0) ^ compute_checksum(video, becomes, 0)


def attach(packet: "Packet[VideoStream]", stamp: Stamp, checksum: int) -> None:
    """Give a packet its stamp, in place of the one it may have."""
    addition = _ADDITION.pack(_CODEC_SPECIFIC, stamp.number, stamp.last, stamp.pts, checksum)
    kind = packet_sidedata_type_from_literal(_SIDE_DATA)
    side_data = PacketSideData(kind, len(addition))  # type: ignore[call-arg]  # missing in PyAV's stubs
    side_data.update(addition)
    side_data.to_packet(packet, move=True)  # type: ignore[arg-type]  # a packet of any stream, say the stubs


def read(packet: "Packet[VideoStream]") -> tuple[Stamp, int]:
    """The stamp and the checksum; struct.error for a packet with none."""
    _, number, last, pts, found = _ADDITION.unpack(bytes(packet.get_sidedata(_SIDE_DATA)))
    return Stamp(number, last, pts), found


def is_sound(data: bytes) -> bool:
    """Whether an FFV1 frame is as it was encoded, by the checksums of its slices: a thousandth of decoding it.

    They run over the bits of a byte in the other direction than zlib's, from 0, and with themselves leave 0.
    """
    end = len(data)
    while end > 0:
        if end < _SLICE_END.size:
            return False
        high, low, _, _ = _SLICE_END.unpack_from(data, end - _SLICE_END.size)
        start = end - _SLICE_END.size - (high << 16 | low)
        if start < 0 or zlib.crc32(data[start:end].translate(_MIRRORED), 0xFFFFFFFF) != 0xFFFFFFFF:
            return False
        end = start
    return len(data) > 0
