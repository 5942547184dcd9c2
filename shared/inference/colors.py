"""From a decoder's pixels to 8-bit RGB, the same bytes for the same frame wherever decoding began."""

from dataclasses import dataclass

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
"""FFmpeg's AVColorSpace, which is ISO/IEC 23091-2's MatrixCoefficients, to the matrix that swscale knows it by."""
_NAMES = {
    Colorspace.ITU709: "bt709",
    Colorspace.FCC: "fcc",
    Colorspace.ITU601: "bt601",
    Colorspace.SMPTE240M: "smpte240m",
    Colorspace.BT2020: "bt2020",
}
_BY_NAME = {name: matrix for matrix, name in _NAMES.items()}
_RGB, _UNSPECIFIED = 0, 2
_HIGH_DYNAMIC_RANGE = {16: "PQ", 18: "HLG"}
_EXACT = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclass(frozen=True)
class Colors:
    """`matrix` is bt601, bt709, bt2020, fcc, smpte240m or rgb; `full_range` whether black is 0, not 16."""

    matrix: str
    full_range: bool


def describe_colors(frame: VideoFrame) -> tuple[Colors, list[str]]:
    """What the frame's tags say, and warnings where its colours are only approximated.

    Untagged frames are taken as most players do: BT.709 above 576 rows or from 1280 columns on, otherwise BT.601;
    limited range, except in formats that are full by definition.
    """
    name = frame.format.name
    warnings = []
    if frame.color_trc in _HIGH_DYNAMIC_RANGE:
        curve = _HIGH_DYNAMIC_RANGE[frame.color_trc]
        warnings.append(f"The recording has a high dynamic range ({curve}); its pixels are taken without tone mapping")
    if frame.format.is_rgb or frame.colorspace == _RGB:
        return Colors("rgb", full_range=True), warnings
    matrix = _MATRICES.get(frame.colorspace)
    if matrix is None:
        matrix = Colorspace.ITU709 if frame.height > 576 or frame.width >= 1280 else Colorspace.ITU601
        if frame.colorspace != _UNSPECIFIED:
            warnings.append(f"The recording's colour matrix is not known; it is taken as {_NAMES[matrix]}")
    full = frame.color_range == ColorRange.JPEG or name.startswith("yuvj")
    return Colors(_NAMES[matrix], full), warnings


class RgbConverter:
    """Converts frames of one recording; one swscale context serves all, as each of them keeps megabytes."""

    def __init__(self, colors: Colors, size: tuple[int, int]) -> None:
        self._colors = colors
        self._size = size
        self._reformatter = VideoReformatter()

    def convert(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """The frame as uint8 (height, width, 3) RGB; one of another size is scaled to the recording's."""
        width, height = self._size
        matrix = _BY_NAME.get(self._colors.matrix)
        converted = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            # Planes, put side by side by NumPy: the same bytes as packed, which swscale makes nine times as slowly.
            format="gbrp",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=ColorRange.JPEG if self._colors.full_range else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=_EXACT,
            threads=1,
        )
        return np.asarray(converted.to_ndarray(), dtype=np.uint8)
