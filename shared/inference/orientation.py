"""How a stored picture is turned to be upright: by a quarter turn, and for some cameras mirrored."""

import math
import struct
from dataclasses import dataclass

import numpy as np
from av.buffer import Buffer
from av.video.frame import VideoFrame
from numpy.typing import NDArray

_MATRIX = struct.Struct("=9i")


@dataclass(frozen=True)
class Orientation:
    """A stored picture is turned clockwise by `rotation`, 0, 90, 180 or 270; then `mirrored` swaps left and right."""

    rotation: int
    mirrored: bool

    def turn(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The upright image (h, w, 3) of a stored one; contiguous."""
        turned = np.rot90(image, -self.rotation // 90)
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)

    def turn_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The upright (width, height) of a stored one."""
        width, height = size
        return (height, width) if self.rotation % 180 else (width, height)


UPRIGHT = Orientation(0, mirrored=False)


def read_orientation(frame: VideoFrame) -> tuple[Orientation, list[str]]:
    """How a decoded frame says that it is to be shown, and a warning where that is no quarter turn.

    The display matrix maps a stored place (x, y), y downwards, to (a·x + c·y, b·x + d·y), in 16.16 fixed point.
    """
    data: object = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(data, Buffer) or data.buffer_size < _MATRIX.size:
        return UPRIGHT, []
    a, b, _, c, d, *_ = _MATRIX.unpack(bytes(data)[: _MATRIX.size])
    determinant = a * d - b * c
    if not determinant:
        return UPRIGHT, ["The recording's display matrix turns pictures into nothing; it is left out"]
    # A mirrored matrix is a turn followed by the exchange of left and right, which negates what makes x.
    degrees = math.degrees(math.atan2(b, -a if determinant < 0 else a))
    rotation = round(degrees / 90) * 90
    warnings = []
    if abs(degrees - rotation) > 1:
        warnings.append(f"The recording is to be shown turned by {degrees:.0f}°; it is taken as turned by {rotation}°")
    return Orientation(rotation % 360, mirrored=determinant < 0), warnings
