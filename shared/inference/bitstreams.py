"""The few bits of compressed packets that containers do not tell, read without decoding."""

from collections.abc import Iterator

from av.packet import Packet
from av.video.stream import VideoStream

_SLICE, _IDR = 1, 5
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


def has_idr(packet: "Packet[VideoStream]", extradata: bytes | None) -> bool:
    """Whether a packet of H.264 begins anew (an IDR picture), rather than at a point to recover from."""
    data = memoryview(packet)
    # MP4 and Matroska say the length of each unit, how long that is their header (avcC); others have start codes.
    if extradata is not None and len(extradata) > 4 and extradata[0] == 1:
        kinds = _kinds_by_length(data, (extradata[4] & 3) + 1)
    else:
        kinds = _kinds_by_start_code(bytes(data))
    return next((kind for kind in kinds if kind in (_SLICE, _IDR)), _SLICE) == _IDR


def _kinds_by_length(data: memoryview, width: int) -> Iterator[int]:
    at = 0
    while at + width < len(data):
        yield data[at + width] & 31
        at += width + int.from_bytes(data[at : at + width], "big")


def _kinds_by_start_code(data: bytes) -> Iterator[int]:
    at = data.find(_START_CODE)
    while 0 <= at < len(data) - 3:
        yield data[at + 3] & 31
        at = data.find(_START_CODE, at + 3)
