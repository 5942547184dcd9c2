"""H.264 whose fields are pictures of their own, as television sends it; no encoder at hand makes it, so this does.

Every block is stored as it is (I_PCM), which needs no more than headers.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tests.recordings import RATE, draw, look_alike, numbers, probe_all, read_all

FRAMES, GOP, SIZE = 12, 4, (96, 64)
TICKS = 90_000 // RATE


class Bits:
    def __init__(self) -> None:
        self.text = ""

    def put(self, value: int, width: int = 1) -> None:
        self.text += f"{value:0{width}b}"

    def golomb(self, *values: int) -> None:
        for value in values:
            code = f"{value + 1:b}"
            self.text += "0" * (len(code) - 1) + code

    def align(self) -> None:
        self.text += "0" * (-len(self.text) % 8)

    def to_unit(self, kind: int) -> bytes:
        """The unit with its stop bit, and bytes that keep start codes out of it."""
        self.put(1)
        self.align()
        unit, zeros = bytearray(), 0
        for byte in int(self.text, 2).to_bytes(len(self.text) // 8, "big"):
            if zeros >= 2 and byte <= 3:
                unit.append(3)
                zeros = 0
            unit.append(byte)
            zeros = zeros + 1 if byte == 0 else 0
        return b"\0\0\0\1" + bytes([kind]) + bytes(unit)


def make_headers() -> bytes:
    """Sequence (main profile, 4 bits per number, order of showing as of decoding, fields) and picture parameters."""
    sequence, picture = Bits(), Bits()
    sequence.put(77 << 16 | 30, 24)
    sequence.golomb(0, 0, 2, 1)
    sequence.put(0)
    sequence.golomb(SIZE[0] // 16 - 1, SIZE[1] // 32 - 1)
    sequence.put(0b001000, 6)
    picture.golomb(0, 0)
    picture.put(0, 2)
    picture.golomb(0, 0, 0)
    picture.put(0, 3)
    picture.golomb(0, 0, 0)
    picture.put(0b100, 3)
    return sequence.to_unit(0x67) + picture.to_unit(0x68)


def make_field(planes: list[NDArray[np.uint8]], number: int, *, bottom: bool, instantaneous: int | None) -> bytes:
    bits = Bits()
    bits.golomb(0, 7, 0)
    bits.put(number % GOP, 4)
    bits.put(1)
    bits.put(bottom)
    if instantaneous is not None:
        bits.golomb(instantaneous)
        bits.put(0)
    bits.put(0)
    # Quantisation as it is, no deblocking.
    bits.golomb(0, 1)
    luma, *chroma = [plane[int(bottom) :: 2] for plane in planes]
    for down in range(luma.shape[0] // 16):
        for across in range(luma.shape[1] // 16):
            bits.golomb(25)
            bits.align()
            for plane, side in ((luma, 16), *((plane, 8) for plane in chroma)):
                block = plane[down * side : (down + 1) * side, across * side : (across + 1) * side]
                bits.text += "".join(f"{value:08b}" for value in block.ravel().tolist())
    return bits.to_unit(0x61 if instantaneous is None else 0x65)


@pytest.fixture(scope="module")
def television(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fields") / "television.ts"
    with av.open(path, "w", format="mpegts") as output:
        stream = output.add_stream("libx264", rate=RATE, width=SIZE[0], height=SIZE[1], pix_fmt="yuv420p")
        assert isinstance(stream, VideoStream)
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(draw(number, SIZE), format="rgb24").reformat(format="yuv420p")
            width, height = SIZE
            luma, chroma = np.split(np.asarray(frame.to_ndarray(), np.uint8), [height])
            planes = [luma, *chroma.reshape(2, height // 2, width // 2)]
            key = number % GOP == 0
            content = b"\0\0\0\1\x09\xf0" + (make_headers() if key else b"")
            content += make_field(planes, number, bottom=False, instantaneous=number // GOP % 2 if key else None)
            content += make_field(planes, number, bottom=True, instantaneous=None)
            packet = Packet(content)
            packet.stream, packet.is_keyframe = stream, key
            packet.pts = packet.dts = number * TICKS
            packet.time_base = Fraction(1, 90_000)
            output.mux(packet)
    return path


def test_two_fields_are_one_frame(television: Path) -> None:
    index = probe_all(television)
    assert index.times.tolist() == [number * TICKS for number in range(FRAMES)]
    assert not index.header.warnings


@pytest.mark.parametrize("length", [1, 5, 10**6])
def test_a_frame_of_two_fields_is_the_right_one_whatever_the_chunks(television: Path, length: int) -> None:
    index = probe_all(television)
    frames = read_all(television, index, frames=length)
    assert numbers(frames) == list(range(FRAMES))
    for frame, other in zip(frames, read_all(television, index), strict=True):
        assert look_alike(frame, other)


@pytest.mark.parametrize("field", [0, 1])
def test_a_frame_is_lost_with_either_of_its_fields(television: Path, field: int) -> None:
    data = bytearray(television.read_bytes())
    damaged = 5
    with av.open(television) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.size and packet.pts is not None]
    begin, end = starts[damaged] or 0, starts[damaged + 1] or 0
    # The first packet of the transport stream has the headers; of each field, a third in the middle is destroyed.
    count = (end - begin) // 188
    for part in range(count * (1 + 3 * field) // 6, count * (2 + 3 * field) // 6):
        at = begin + part * 188
        if data[at + 1] & 1:
            data[at + 4 : at + 188] = b"\xff" * 184
    index = probe_all(bytes(data))
    for length in (1, 5, 10**6):
        shown = numbers(read_all(bytes(data), index, frames=length))
        assert shown == [None if number == damaged else number for number in range(FRAMES)]
