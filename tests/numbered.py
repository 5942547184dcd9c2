"""Small recordings whose every frame says its number in squares of black and white, whatever a codec does to it."""

import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

SIZE = (96, 64)
BITS = 8
_SQUARE = SIZE[0] // BITS


def draw_number(number: int) -> NDArray[np.uint8]:
    """uint8 RGB (64, 96, 3)."""
    image = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            image[: SIZE[1] // 2, bit * _SQUARE : (bit + 1) * _SQUARE] = 255
    image[SIZE[1] // 2 :] = (40, 160, 90)
    return image


def read_number(image: NDArray[np.uint8]) -> int:
    """The number in a frame, from the middle of each square."""
    rows = slice(SIZE[1] // 8, SIZE[1] // 2 - SIZE[1] // 8)
    middles = (image[rows, bit * _SQUARE + 3 : (bit + 1) * _SQUARE - 3].mean() for bit in range(BITS))
    return sum(1 << bit for bit, middle in enumerate(middles) if middle > 128)


def write_recording(
    numbers: Iterable[int], *, container: str = "mp4", codec: str = "libx264", keyframe_every: int = 10, **options: Any
) -> bytes:
    """The frames with these numbers at 25 per second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        chosen = {"g": str(keyframe_every), "bf": "2", **options}
        stream = file.add_stream(codec, rate=25, width=SIZE[0], height=SIZE[1], pix_fmt="yuv420p", options=chosen)
        for pts, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(draw_number(number), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()
