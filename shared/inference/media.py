"""Images in: bytes of a customer's file to upright RGB pixels, or one of two errors. Recordings are not read here.

Decoders are the part of the service that strangers feed, so the formats are listed, the pixel count is checked before
anything is decoded, and whatever a decoder raises becomes InvalidMedia with a sentence that stays the same.
"""

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.inference.errors import InvalidMedia, MediaLimit, OutOfMemory

# Named one by one because Pillow also knows formats that start other programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
BACKDROP = (255, 255, 255)
"""What transparent pixels are laid on: white, as in most viewers, so a model sees what people see."""

_DAMAGED = "The image is damaged or cut short and cannot be decoded"


def read_image(source: Path | str | bytes | BinaryIO, *, max_pixels: int) -> NDArray[np.uint8]:
    """The pixels of a still image as (height, width, 3) uint8 RGB, upright (EXIF orientation applied).

    `source` is a path, the file's bytes, or an open binary file. 16-bit samples are scaled to 8 bits, transparency is
    composited on BACKDROP, and colour profiles are not applied. Raises InvalidMedia for what is not one sound image in
    one of FORMATS, MediaLimit above `max_pixels` (before decoding), and OSError if a path cannot be opened.
    """
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            return _decode(file, max_pixels)
    return _decode(io.BytesIO(source) if isinstance(source, bytes) else source, max_pixels)


def _decode(file: BinaryIO, max_pixels: int) -> NDArray[np.uint8]:
    # Pillow warns about odd metadata and about large images; the first does not concern the pixels, and the second is
    # what `max_pixels` is for.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _open(file, max_pixels) as image:
            _refuse_sequences(image)
            try:
                image.load()
                pixels = _to_rgb(_upright(image))
            except InvalidMedia:
                raise
            except MemoryError as error:
                raise OutOfMemory(f"Not enough memory to decode an image of {image.width}×{image.height}") from error
            except Exception as error:
                raise InvalidMedia(_DAMAGED) from error
            return pixels


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    """Read the header alone; nothing is decoded yet."""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise InvalidMedia(f"The file is no image of a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise MediaLimit(f"The image has more pixels than the {max_pixels} that are taken") from error
    except Exception as error:
        raise InvalidMedia(_DAMAGED) from error
    width, height = image.size
    if width < 1 or height < 1:
        raise InvalidMedia("The image has no pixels")
    if width * height > max_pixels:
        raise MediaLimit(f"The image has {width}×{height} pixels; at most {max_pixels} are taken")
    return image


def _refuse_sequences(image: Image.Image) -> None:
    # MPO is what phones and cameras write as .jpg: the photo first, then a depth or gain map. The photo is meant.
    if image.format == "MPO":
        return
    try:
        # Asking for a second picture costs one step, where counting all of them could walk millions.
        image.seek(1)
    except EOFError:
        return
    except Exception as error:
        raise InvalidMedia(_DAMAGED) from error
    raise InvalidMedia("The file holds more than one picture (an animation or several pages); send a single image")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        # Broken EXIF says nothing about the pixels: they are taken as stored, as if the tag were absent.
        return image


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise InvalidMedia("Floating-point images have no agreed brightness range; convert the image to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _gray16_to_rgb(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        backdrop = Image.new("RGBA", image.size, (*BACKDROP, 255))
        image = Image.alpha_composite(backdrop, image)
    # Covers 1, L, P, CMYK, YCbCr, LAB and HSV. Adobe's inverted CMYK is already undone by the JPEG decoder.
    return np.array(image.convert("RGB"))


def _gray16_to_rgb(samples: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scale 0..65535 to 0..255, rounded. Pillow's own conversion clips at 255 instead, which turns photos white."""
    wide = samples.astype(np.uint32) if samples.dtype == np.uint16 else samples.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise InvalidMedia("32-bit images have no agreed brightness range; convert the image to 8 or 16 bits")
    gray = ((wide * 255 + 32767) // 65535).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)
