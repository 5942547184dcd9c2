"""Label maps of others: PNG files whose samples are class ids, as benchmarks keep their truth.

Maskline's own masks are read by masks, more strictly. What the ids mean is said in labels.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.inference.errors import InvalidMedia

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GRAY, _PALETTE = 0, 3
_KINDS = {0: "gray", 2: "colours", 3: "palette indices", 4: "gray and transparency", 6: "colours and transparency"}


def read_label_map(path: Path) -> NDArray[np.uint8]:
    """The ids, uint8 (height, width): of 8-bit gray the samples, of a palette PNG (as VOC's) the indices.

    Raises InvalidMedia for anything else, and OSError when the file cannot be opened.
    """
    data = path.read_bytes()
    if not data.startswith(_SIGNATURE) or len(data) < 26:
        raise InvalidMedia("A label map is a PNG, and this file is none")
    bits, kind = data[24], data[25]
    # Fewer than 8 bits of gray are brightness, which decoders stretch to 0..255; palette indices they leave alone.
    if kind != _PALETTE and (kind, bits) != (_GRAY, 8):
        held = _KINDS.get(kind, "something unknown")
        raise InvalidMedia(f"A label map holds 8-bit gray or palette indices, and this one {held} of {bits} bits")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images, which a truth may be
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                return np.array(image, dtype=np.uint8)
    except Exception as error:
        raise InvalidMedia("The label map is damaged and cannot be decoded") from error
