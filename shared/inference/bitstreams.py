"""The few bits of compressed packets that containers do not tell, read without decoding."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from av.packet import Packet
from av.video.stream import VideoStream

EMPTY_BYTES = 16
"""A packet of MPEG-4 that says only "as before" is shorter, and gives no frame."""
SLICES, IDR, SEQUENCE = (1, 2), 5, 7
"""Types of units of H.264."""
_INTRA = (2, 4)
"""I and SI, of the five types of slices."""
_REFERENCE = 0x60
"""The bits of a unit's first byte that say how much others need it."""
_HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
_SEPARATE = 3
"""The kind of chroma (4:4:4) that may be coded as three pictures."""
_AVCC_UNITS = 6
_HEADER_BYTES, _SEQUENCE_BYTES = 16, 256
LOOKED_AT_BYTES = 1 << 16
_MPEG_PICTURE, _MPEG_I, _MPEG_B = b"\x00\x00\x01\x00", 1, 3
_MPEG4_PICTURE, _MPEG4_B = b"\x00\x00\x01\xb6", 2
_START_CODE = b"\x00\x00\x01"


def is_hidden(packet: "Packet[VideoStream]", codec: str) -> bool:
    """Whether a packet of VP8 or VP9 holds a picture that is never shown, but only made others from."""
    data = memoryview(packet)
    if codec == "vp8":
        return not data[0] & 0x10
    # The end of a packet of several pictures says so; encoders put a shown one last.
    if codec == "vp9" and data[-1] & 0xE0 != 0xC0:
        # Profile 3 has one bit more before those that say "shown before" and "shown".
        long = data[0] & 0x30 == 0x30
        return not data[0] & (0x05 if long else 0x0A)
    return False


class Entry(Enum):
    """How well a packet of H.264 that a container marks as a keyframe is one."""

    CLEAN = "an IDR picture: nothing before it is needed"
    RECOVERY = "an intra picture: what is shown before it may need what was before it"
    NONE = "a picture made from others, where a gradual refresh begins; its frames never come out quite the same"


def classify_keyframe(packet: "Packet[VideoStream]", extradata: bytes | None) -> Entry:
    """What a keyframe of H.264 is worth, by its first slice."""
    for kind, unit in read_units(bytes(memoryview(packet)[:LOOKED_AT_BYTES]), extradata):
        if kind & 31 == IDR:
            return Entry.CLEAN
        if kind & 31 in SLICES:
            bits = _Bits(unit[:_HEADER_BYTES])
            bits.unsigned()
            return Entry.RECOVERY if bits.unsigned() % 5 in _INTRA else Entry.NONE
    return Entry.RECOVERY


@dataclass(frozen=True)
class Numbering:
    """How the sequence `name` of H.264 numbers its pictures: in how many bits, and whether some may be left out."""

    name: int
    bits: int
    has_gaps: bool
    has_planes: bool
    has_fields: bool


@dataclass(frozen=True)
class Picture:
    """The header of a picture: its number, whether others may be made from it, and whether it is made from others."""

    number: int
    is_needed: bool
    is_intra: bool = False
    """Of MPEG-1 and -2 only."""
    field: int = 0
    """1 and 2 are the fields of a frame that are pictures of their own, in H.264."""


def read_picture(kind: int, unit: bytes, numbering: Numbering) -> Picture:
    """What a slice of H.264 says of its picture; `kind` is its first byte, `unit` what follows."""
    bits = _Bits(unit[:_HEADER_BYTES])
    for _ in range(3):
        bits.unsigned()
    bits.skip(2 * numbering.has_planes)
    number = bits.read(numbering.bits)
    field = 1 + bits.read(1) if numbering.has_fields and bits.read(1) else 0
    return Picture(number, bool(kind & _REFERENCE), field=field)


def read_numbering(unit: bytes) -> Numbering:
    """What the header of a sequence of H.264 says of its numbers; `unit` is what follows its first byte."""
    bits = _Bits(unit[:_SEQUENCE_BYTES])
    profile = bits.read(8)
    bits.skip(16)
    name = bits.unsigned()
    planes = False
    if profile in _HIGH_PROFILES:
        chroma = bits.unsigned()
        planes = chroma == _SEPARATE and bool(bits.read(1))
        bits.unsigned()
        bits.unsigned()
        bits.skip(1)
        if bits.read(1):
            for number in range(12 if chroma == _SEPARATE else 8):
                if bits.read(1):
                    _skip_scaling(bits, 16 if number < 6 else 64)
    width = bits.unsigned() + 4
    order = bits.unsigned()
    if order == 0:
        bits.unsigned()
    elif order == 1:
        bits.skip(1)
        for _ in range(2):
            bits.unsigned()
        for _ in range(min(bits.unsigned(), 255)):
            bits.unsigned()
    bits.unsigned()
    gaps = bool(bits.read(1))
    bits.unsigned()
    bits.unsigned()
    return Numbering(name, width, gaps, planes, has_fields=not bits.read(1))


def _skip_scaling(bits: "_Bits", size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.unsigned()
            following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) & 255
        last = following or last


def read_mpeg_picture(packet: "Packet[VideoStream]", codec: str) -> Picture | None:
    """What the first picture of a packet of MPEG-1, -2 or -4 says; its number is that in the order of showing.

    None where no header of a picture is found. Those of MPEG-4 have no numbers: 0.
    """
    data = bytes(memoryview(packet)[:LOOKED_AT_BYTES])
    at = data.find(_MPEG4_PICTURE if codec == "mpeg4" else _MPEG_PICTURE) + 4
    if not 4 <= at <= len(data) - 2:
        return None
    if codec == "mpeg4":
        return Picture(0, data[at] >> 6 != _MPEG4_B)
    kind = data[at + 1] >> 3 & 7
    return Picture(data[at] << 2 | data[at + 1] >> 6, kind != _MPEG_B, kind == _MPEG_I)


class _Bits:
    """Reads bits, and exponential Golomb codes, of a unit of H.264; beyond its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        data = data.replace(b"\0\0\3", b"\0\0")
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        shifted = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return shifted & ((1 << count) - 1)

    def skip(self, count: int) -> None:
        self._left -= count

    def unsigned(self) -> int:
        rest = self._value & ((1 << max(self._left, 0)) - 1)
        zeros = min(self._left - rest.bit_length(), 32)
        self.skip(max(zeros, 0))
        return self.read(max(zeros, 0) + 1) - 1


def read_units(data: bytes, extradata: bytes | None) -> Iterator[tuple[int, bytes]]:
    """The first byte of each unit of H.264, and so many of those that follow it as are looked at."""
    # MP4 and Matroska say the length of each unit, how long that is their header (avcC); others have start codes.
    if extradata is not None and len(extradata) > 4 and extradata[0] == 1:
        places = _units_by_length(data, (extradata[4] & 3) + 1)
    else:
        places = _units_by_start_code(data)
    for at in places:
        yield data[at], data[at + 1 : at + 1 + _SEQUENCE_BYTES]


def read_header_units(extradata: bytes | None) -> list[tuple[int, bytes]]:
    """The units of H.264 that the container's header holds, as `read_units` gives them."""
    if extradata is None:
        return []
    if extradata[:1] != b"\x01":
        return list(read_units(extradata, None))
    units, at = list[tuple[int, bytes]](), _AVCC_UNITS
    for _ in range(extradata[at - 1] & 31 if len(extradata) >= at else 0):
        size = int.from_bytes(extradata[at : at + 2], "big")
        unit = extradata[at + 2 : at + 2 + size]
        if unit:
            units.append((unit[0], unit[1:]))
        at += 2 + size
    return units


def _units_by_length(data: bytes, width: int) -> Iterator[int]:
    at = 0
    while at + width < len(data):
        yield at + width
        at += width + int.from_bytes(data[at : at + width], "big")


def _units_by_start_code(data: bytes) -> Iterator[int]:
    at = data.find(_START_CODE)
    while 0 <= at < len(data) - 3:
        yield at + 3
        at = data.find(_START_CODE, at + 3)
