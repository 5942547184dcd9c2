"""An image beside its mask, with the names of the colours: what the demo and the README show."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.inference import masks
from shared.inference.labels import LabelSpace

PANEL_WIDTH = 432
GAP = 12
TEXT_SIZE = 15
SWATCH = 14
ENTRY_GAP = 18
INK = (40, 44, 52)
PAPER = (255, 255, 255)
OPACITY = 0.8


def draw_comparison(image: NDArray[np.uint8], labels: NDArray[np.uint8], label_space: LabelSpace) -> bytes:
    """A PNG: the image, its classes tinted over it, and below them a legend of the classes that occur."""
    height = round(PANEL_WIDTH * image.shape[0] / image.shape[1])
    tinted = masks.overlay(image, labels, label_space, opacity=OPACITY)
    present = sorted(masks.class_areas(labels))
    font = ImageFont.load_default(TEXT_SIZE)
    width = 2 * PANEL_WIDTH + 3 * GAP
    rows = _lay_out([label_space.classes[number] for number in present], font=font, width=width)
    line_height = SWATCH + GAP
    sheet = Image.new("RGB", (width, height + 2 * GAP + (rows[-1][1] + 1) * line_height), PAPER)
    for number, pixels in enumerate((image, tinted)):
        panel = Image.fromarray(pixels).resize((PANEL_WIDTH, height), Image.Resampling.LANCZOS)
        sheet.paste(panel, (GAP + number * (PANEL_WIDTH + GAP), GAP))
    draw = ImageDraw.Draw(sheet)
    for class_id, (x, row) in zip(present, rows, strict=True):
        y = height + 2 * GAP + row * line_height
        draw.rounded_rectangle((x, y, x + SWATCH, y + SWATCH), radius=3, fill=label_space.palette[class_id])
        draw.text((x + SWATCH + 6, y + SWATCH / 2), label_space.classes[class_id], fill=INK, font=font, anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _lay_out(
    names: Sequence[str], *, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[tuple[float, int]]:
    """Where each entry begins: across in pixels, and in which row."""
    places: list[tuple[float, int]] = []
    x, row = float(GAP), 0
    for name in names:
        wide = SWATCH + 6 + font.getlength(name)
        if x + wide > width - GAP and places:
            x, row = float(GAP), row + 1
        places.append((x, row))
        x += wide + ENTRY_GAP
    return places
