"""The few bits of compressed packets that containers do not tell, read without decoding."""

from collections.abc import Iterator
from enum import Enum

from av.packet import Packet
from av.video.stream import VideoStream

_SLICES, _IDR = (1, 2), 5
_INTRA = (2, 4)
"""I and SI, of the five types of slices."""
_LOOKED_AT_BYTES = 1 << 16
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
    data = bytes(memoryview(packet)[:_LOOKED_AT_BYTES])
    # MP4 and Matroska say the length of each unit, how long that is their header (avcC); others have start codes.
    if extradata is not None and len(extradata) > 4 and extradata[0] == 1:
        units = _units_by_length(data, (extradata[4] & 3) + 1)
    else:
        units = _units_by_start_code(data)
    for at in units:
        kind = data[at] & 31
        if kind == _IDR:
            return Entry.CLEAN
        if kind in _SLICES:
            return Entry.RECOVERY if _read_slice_type(data[at + 1 : at + 9]) % 5 in _INTRA else Entry.NONE
    return Entry.RECOVERY


def _read_slice_type(header: bytes) -> int:
    """The second number of a slice's header; both are exponential Golomb codes."""
    bits = "".join(f"{byte:08b}" for byte in header)
    value = 0
    for _ in range(2):
        zeros = len(bits) - len(bits.lstrip("0"))
        value = int(bits[zeros : 2 * zeros + 1] or "0", 2) - 1
        bits = bits[2 * zeros + 1 :]
    return value


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
