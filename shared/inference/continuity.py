"""Whether a packet follows the one before it, by the numbers that a codec gives its pictures.

Where a container lost a whole packet, or took it for the end of another, a decoder makes what follows from what it
has, and calls it sound.
"""

from dataclasses import replace

from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from shared.inference.bitstreams import (
    IDR,
    LOOKED_AT_BYTES,
    SEQUENCE,
    SLICES,
    Numbering,
    Picture,
    read_header_units,
    read_mpeg_picture,
    read_numbering,
    read_picture,
    read_units,
)

_PICTURE_NUMBERS = 1024
"""After so many, MPEG-1 and -2 count from 0 again."""


class Continuity:
    """What the packets so far, in the order of decoding, say of the last one.

    Only what codecs number is seen: of H.264 the pictures that others are made from; of MPEG-1 and -2 a picture that
    B-frames are made from. The pictures of the other codecs either have no numbers, or their decoders look at them.

    `is_broken`: a picture that the last one may be made from has gone missing before it. `is_restarted`: counting began
    anew without a keyframe, which may be so, or one is missing. `is_readable`: False where no header of a picture was
    found. `is_needed`: others may be made from it, as far as is known. `is_second_field`: it completes the frame that
    the packet before began, as in H.264 in a transport stream.
    """

    def __init__(self, context: VideoCodecContext) -> None:
        self.is_broken = self.is_restarted = False
        self.is_readable = self.is_needed = True
        self.is_second_field = False
        self._picture: Picture | None = None
        self._codec = context.name
        self._extradata = context.extradata
        self._numberings: dict[int, Numbering] = {}
        self._expected: tuple[int, ...] | None = None
        if self._codec == "h264":
            for kind, unit in read_header_units(self._extradata):
                self._learn(kind, unit)

    @property
    def has_fields(self) -> bool:
        """Whether the container's header tells that fields may be pictures of their own."""
        return any(numbering.has_fields for numbering in self._numberings.values())

    def forget(self) -> None:
        """Begin anew, as after a packet that is known to be lost."""
        self._expected = None

    def add(self, packet: "Packet[VideoStream]", *, keyframe: bool) -> None:
        """The next packet: each is to be told, but for those that are known to be damaged."""
        self.is_broken = self.is_restarted = False
        self.is_readable, self.is_needed = True, not packet.is_disposable
        if keyframe:
            self.forget()
        if self._codec == "h264":
            self._add_h264(packet)
        elif self._codec in ("mpeg1video", "mpeg2video", "mpeg4"):
            self._add_mpeg(packet)

    def _add_h264(self, packet: "Packet[VideoStream]") -> None:
        picture, numbering = self._read_h264(packet)
        self.is_readable = picture is not None
        previous, self._picture = self._picture, picture
        self.is_second_field = bool(
            picture and previous and picture.number == previous.number and {picture.field, previous.field} == {1, 2}
        )
        if self.is_second_field:
            self._picture = None
        if picture is None or numbering is None:
            return
        self.is_needed = picture.is_needed
        odd = self._expected is not None and not numbering.has_gaps and picture.number not in self._expected
        # 0 is also where counting begins anew without a keyframe, and 1 what follows then.
        self.is_restarted = odd and picture.number in (0, 1)
        self.is_broken = odd and not self.is_restarted
        following = (picture.number + 1) % (1 << numbering.bits)
        # Two fields of a picture have one number.
        self._expected = (picture.number, following) if picture.is_needed else (picture.number,)

    def _add_mpeg(self, packet: "Packet[VideoStream]") -> None:
        picture = read_mpeg_picture(packet, self._codec)
        self.is_readable = picture is not None
        if picture is None:
            return
        self.is_needed = picture.is_needed
        if self._codec == "mpeg4":
            return
        if picture.is_intra or self._expected is None:
            self._expected = (picture.number, picture.number)
            return
        first, last = self._expected
        ahead = (picture.number - last) % _PICTURE_NUMBERS
        if picture.is_needed:
            self.is_broken = ahead > _PICTURE_NUMBERS // 2
            self._expected = last, picture.number
        else:
            # A B-frame is shown between the two pictures that it is made from; of the first ones, one is not known.
            span = (last - first) % _PICTURE_NUMBERS or _PICTURE_NUMBERS // 2
            # Some encoders number all alike.
            self.is_broken = (last - picture.number) % _PICTURE_NUMBERS >= span

    def _read_h264(self, packet: "Packet[VideoStream]") -> tuple[Picture | None, Numbering | None]:
        for kind, unit in read_units(bytes(memoryview(packet)[:LOOKED_AT_BYTES]), self._extradata):
            self._learn(kind, unit)
            if kind & 31 in (*SLICES, IDR):
                # Where sequences number in several ways, a number could be taken for what it is not.
                numberings = {replace(numbering, name=0) for numbering in self._numberings.values()}
                numbering = next(iter(numberings), None)
                if numbering is None or len(numberings) > 1:
                    return Picture(0, is_needed=True), None
                return read_picture(kind, unit, numbering), numbering
        return None, None

    def _learn(self, kind: int, unit: bytes) -> None:
        if kind & 31 == SEQUENCE:
            numbering = read_numbering(unit)
            self._numberings[numbering.name] = numbering
