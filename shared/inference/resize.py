"""From pixels to a model's input: which size, and the resize to it.

The input has about N×N pixels whatever the aspect, so time and memory are the same for a square and a wide frame.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

STRIDE = 32
"""Both sides are multiples of this, the coarsest stride of the models, so no model pads."""
MAX_ASPECT = 64.0
"""Beyond this, an input side would be so short that windowed attention pads it many times over; it is squeezed."""


def fit_size(width: int, height: int, input_size: int) -> tuple[int, int]:
    """The (width, height) of the model's input: aspect kept, about `input_size` squared pixels, multiples of STRIDE.

    1024 makes 1024×1024 of a square and 1376×768 of 16:9. Raises ValueError for a side below one pixel or an
    `input_size` below STRIDE.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}×{height} has no pixels")
    if input_size < STRIDE:
        raise ValueError(f"input_size {input_size} is below {STRIDE}")
    aspect = min(max(width / height, 1 / MAX_ASPECT), MAX_ASPECT)
    sides = (input_size * math.sqrt(aspect), input_size / math.sqrt(aspect))
    fitted_width, fitted_height = (max(STRIDE, math.floor(side / STRIDE + 0.5) * STRIDE) for side in sides)
    return fitted_width, fitted_height


def to_input(
    image: NDArray[np.uint8],
    *,
    size: tuple[int, int],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device,
    padded: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Resize and normalise (height, width, 3) uint8 RGB on the device: float32 (1, 3, size[1], size[0]).

    Bilinear with antialiasing, in floating point; then / 255, - mean, / std. To `padded` (width, height), if given,
    it is filled up with zeros at the right and below.
    """
    width, height = size
    # torch takes neither mirrored views nor read-only arrays; anything else is passed on without a copy.
    pixels = torch.from_numpy(np.require(image, requirements=("C", "W")))
    if device.type == "cuda":
        # Only from pinned memory does the copy go by itself while the CPU prepares what follows.
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    columns, rows = padded or size
    planes = torch.zeros((1, 3, rows, columns), dtype=torch.float32, device=device)
    # One channel at a time, because the whole image as float32 would take four times its bytes.
    for channel in range(3):
        plane = pixels[None, None, :, :, channel].to(torch.float32)
        plane = functional.interpolate(plane, size=(height, width), mode="bilinear", antialias=True)
        planes[:, channel, :height, :width] = (plane[:, 0] / 255 - mean[channel]) / std[channel]
    return planes
