"""Tiny recordings whose every frame shows its own number, in a code that survives lossy compression."""

import io
import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from shared.inference.chunks import plan_chunks
from shared.inference.frames import Frame, read_frames
from shared.inference.probe import probe
from shared.inference.recording import Index, Limits

Image = NDArray[np.uint8]

LIMITS = Limits(max_pixels=1_000_000, max_frames=10_000, max_seconds=10_000)
FRAMES = 40
GOP = 12
RATE = 25
BITS = 6
RED, GREEN, BLUE = (200, 30, 30), (30, 160, 30), (40, 40, 200)


def draw(number: int, size: tuple[int, int] = (96, 64)) -> Image:
    """The number in black and white columns, lowest bit left; a red corner at the top left, a blue one at its right."""
    width, height = size
    image = np.full((height, width, 3), 110, np.uint8)
    for bit, (left, right) in enumerate(_columns(width)):
        image[height // 3 :, left:right] = 195 if number >> bit & 1 else 16
    image[: height // 3, : width // 2] = RED
    image[: height // 3, width // 2 :] = BLUE
    return image


def read_number(image: Image) -> int:
    """The number that an upright image shows."""
    row = image[image.shape[0] * 5 // 6, :, 1]
    return sum(int(row[(left + right) // 2] > 126) << bit for bit, (left, right) in enumerate(_columns(len(row))))


def _columns(width: int) -> list[tuple[int, int]]:
    return [(bit * width // BITS, (bit + 1) * width // BITS) for bit in range(BITS)]


def encode(
    target: Path | BinaryIO,
    codec: str,
    *,
    container: str | None = None,
    frames: int = FRAMES,
    times: Sequence[int] | None = None,
    size: tuple[int, int] = (96, 64),
    pixel_format: str = "yuv420p",
    grain: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    prepare: Callable[[VideoStream], None] | None = None,
    tag: Callable[[av.VideoFrame], None] | None = None,
) -> None:
    """Write frames 0, 1, … at `times`, in 1/RATE s, with a keyframe every GOP; `grain` makes them large."""
    random = np.random.default_rng(1)
    with av.open(target, "w", format=container, container_options=container_options or {}) as output:
        stream = output.add_stream(
            codec, rate=RATE, options=options or {}, width=size[0], height=size[1], pix_fmt=pixel_format
        )
        assert isinstance(stream, VideoStream)
        stream.codec_context.gop_size = GOP
        if prepare is not None:
            prepare(stream)
        for number in range(frames):
            image = draw(number, size) + random.integers(0, grain + 1, (size[1], size[0], 1), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, RATE)
            if tag is not None:
                tag(frame)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def remux(
    source: Path, change: Callable[[int, "Packet[VideoStream]"], Iterable["Packet[VideoStream]"]], *, container: str
) -> bytes:
    """The packets of a recording in another file, each as `change` gives it back."""
    buffer = io.BytesIO()
    with av.open(source) as original, av.open(buffer, "w", format=container) as copy:
        stream = copy.add_stream_from_template(original.streams.video[0])
        packets = [packet for packet in original.demux(original.streams.video[0]) if packet.size]
        for number, packet in enumerate(packets):
            for changed in change(number, packet):
                changed.stream = stream
                copy.mux(changed)
    return buffer.getvalue()


def read_all(source: bytes | Path, index: Index, *, frames: int = 10**6, exact: bool = True) -> list[Frame]:
    """Every frame, read by chunks of so many."""
    return [
        frame
        for chunk in plan_chunks(index, frames=frames, exact=exact)
        for frame in read_frames(open_source(source), index, chunk)
    ]


def probe_all(source: bytes | Path) -> Index:
    return probe(open_source(source), limits=LIMITS)


def open_source(source: bytes | Path) -> BinaryIO | Path:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def numbers(frames: Iterable[Frame]) -> list[int | None]:
    """What each frame shows; None where there is no image."""
    return [None if frame.image is None else read_number(frame.image) for frame in frames]


def look_alike(one: Frame, other: Frame) -> bool:
    """Whether both have the same image, or none."""
    if one.image is None or other.image is None:
        return one.image is other.image
    return np.array_equal(one.image, other.image)


def packet_places(source: Path) -> list[tuple[int, int]]:
    """Where each packet of the video lies in the file: first byte and how many."""
    with av.open(source) as container:
        return [(packet.pos or 0, packet.size) for packet in container.demux(video=0) if packet.size]


def box(kind: bytes, *content: bytes) -> bytes:
    """An atom of MP4."""
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def point_elsewhere(data: bytes, entry: bytes) -> bytes:
    """An MP4 with its movie header last, whose data reference is `entry`; every box around grows along."""
    place = data.index(b"url \0\0\0\1") - 4
    grown = bytearray(data[:place] + entry + data[place + 12 :])
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        start = data.rindex(kind, 0, place) - 4
        size = int.from_bytes(data[start : start + 4], "big") + len(entry) - 12
        grown[start : start + 4] = size.to_bytes(4, "big")
    return bytes(grown)


def make_sound() -> bytes:
    """An MP4 with silence and no picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=48000)
        for _ in range(5):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 48000
            output.mux(stream.encode(silence))
        output.mux(stream.encode(None))
    return buffer.getvalue()
