"""Masks as files and as pictures: the lossless PNG of class ids, its colours, and the overlay for people.

A mask is uint8 (height, width), one class id per pixel. What an id means is said in labels.
"""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.inference.errors import InvalidMedia
from shared.inference.labels import LabelSpace

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FILTER_UP = 2
_BAND_ROWS = 512
"""Rows handled at once where a step needs several times the bytes of its input."""


def encode_mask(labels: NDArray[np.uint8]) -> bytes:
    """An 8-bit grayscale PNG whose samples are the class ids.

    Written here because label maps are mostly equal to the row above: the Up filter and run-length matching alone
    make smaller files than Pillow's level 6, several times faster (bench/codecs.py). Little memory for the packer is
    meant: its blocks end sooner, so each part of the map gets codes of its own, which costs no time and fewer bytes.
    Raises ValueError unless uint8 (height, width).
    """
    if labels.dtype != np.uint8 or labels.ndim != 2 or not labels.size:
        raise ValueError(f"a mask is uint8 (height, width), not {labels.dtype} {labels.shape}")
    height, width = labels.shape
    rows = np.empty((height, width + 1), dtype=np.uint8)
    rows[:, 0] = _FILTER_UP
    rows[0, 1:] = labels[0]
    np.subtract(labels[1:], labels[:-1], out=rows[1:, 1:])
    packer = zlib.compressobj(level=1, memLevel=5, strategy=zlib.Z_RLE)
    data = packer.compress(rows.data) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return _PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def decode_mask(data: bytes) -> NDArray[np.uint8]:
    """The class ids of a mask PNG, uint8 (height, width); raises InvalidMedia unless it is an 8-bit grayscale PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode != "L":
                raise InvalidMedia(f'A mask is an 8-bit grayscale PNG ("L"), and this one is "{image.mode}"')
            return np.array(image)
    except InvalidMedia:
        raise
    except Exception as error:
        raise InvalidMedia("The mask is damaged or no PNG") from error


def class_areas(labels: NDArray[np.uint8]) -> dict[int, int]:
    """How many pixels each class that occurs covers, by class id in ascending order."""
    counts = np.zeros(256, dtype=np.int64)
    for top in range(0, labels.shape[0], _BAND_ROWS):
        counts += np.bincount(labels[top : top + _BAND_ROWS].ravel(), minlength=256)
    return {int(class_id): int(counts[class_id]) for class_id in np.flatnonzero(counts)}


def colour(labels: NDArray[np.uint8], label_space: LabelSpace) -> NDArray[np.uint8]:
    """The mask in the colours of its label space: uint8 RGB (height, width, 3). IndexError for an id beyond it."""
    return np.array(label_space.palette, dtype=np.uint8)[labels]


def overlay(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], label_space: LabelSpace, *, opacity: float = 0.5
) -> NDArray[np.uint8]:
    """The image with its classes tinted over it, uint8 RGB; id 0 (background, unlabeled) stays as it is.

    Raises ValueError unless image and mask have the same height and width and 0 <= opacity <= 1.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f"the image is {image.shape[:2]}, its mask {labels.shape}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity {opacity} is not between 0 and 1")
    weights = np.where(np.arange(len(label_space.classes)) > 0, round(opacity * 256), 0).astype(np.uint16)
    tinted = np.empty_like(image)
    for top in range(0, labels.shape[0], _BAND_ROWS):
        band = labels[top : top + _BAND_ROWS]
        weight = weights[band][:, :, None]
        mixed = image[top : top + _BAND_ROWS] * (256 - weight) + colour(band, label_space) * weight
        tinted[top : top + _BAND_ROWS] = (mixed + 128) >> 8
    return tinted


def encode_png(rgb: NDArray[np.uint8]) -> bytes:
    """A PNG of uint8 RGB (height, width, 3), for previews."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()
