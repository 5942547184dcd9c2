"""How much of each frame every class covers, over time, as a picture: what the demo shows of a recording."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli.picture import GAP, INK, PAPER, SWATCH, TEXT_SIZE
from shared.inference.labels import LabelSpace

PLOT_SIZE = (640, 320)
LEFT, BOTTOM, LEGEND_WIDTH = 52, 30, 130
SUPERSAMPLING = 2
"""Slanting edges are drawn larger and averaged, as they would look like stairs."""


def draw_areas(seconds: Sequence[float], areas: Sequence[Mapping[int, float]], label_space: LabelSpace) -> bytes:
    """A PNG: the fraction of the frame that each class id covers, stacked, at the time of every frame.

    Raises ValueError for no frames at all.
    """
    if not seconds:
        raise ValueError("there is no frame to show")
    present = sorted({number for each in areas for number in each})
    shares = np.array([[each.get(number, 0.0) for each in areas] for number in present])
    tops = np.vstack([np.zeros(len(seconds)), np.cumsum(shares, axis=0)])
    width, height = PLOT_SIZE
    sheet = Image.new("RGB", (LEFT + width + LEGEND_WIDTH, GAP + height + BOTTOM), PAPER)
    sheet.paste(_draw_bands(seconds, tops, [label_space.palette[number] for number in present]), (LEFT, GAP))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT_SIZE)
    for share in (0, 50, 100):
        y = GAP + height * (1 - share / 100)
        draw.text((LEFT - 6, y), f"{share} %", fill=INK, font=font, anchor="rm" if 0 < share < 100 else "rs")
    begin, end = seconds[0], seconds[-1]
    for x, second, anchor in ((LEFT, begin, "lt"), (LEFT + width, end, "rt")):
        draw.text((x, GAP + height + 6), f"{second:.1f} s", fill=INK, font=font, anchor=anchor)
    for row, number in enumerate(reversed(present)):
        x, y = LEFT + width + GAP, GAP + row * (SWATCH + GAP)
        draw.rounded_rectangle((x, y, x + SWATCH, y + SWATCH), radius=3, fill=label_space.palette[number])
        draw.text((x + SWATCH + 6, y + SWATCH / 2), label_space.classes[number], fill=INK, font=font, anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _draw_bands(
    seconds: Sequence[float], tops: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", colours: Sequence[object]
) -> Image.Image:
    width, height = (SUPERSAMPLING * side for side in PLOT_SIZE)
    bands = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(bands)
    span = seconds[-1] - seconds[0] or 1.0
    across = [(second - seconds[0]) / span * width for second in seconds]
    if len(across) == 1:
        across, tops = [0.0, float(width)], tops.repeat(2, axis=1)
    for below, above, colour in zip(tops, tops[1:], colours, strict=False):
        upper = [(x, height * (1 - share)) for x, share in zip(across, above, strict=True)]
        lower = [(x, height * (1 - share)) for x, share in zip(across, below, strict=True)]
        draw.polygon([*upper, *reversed(lower)], fill=colour)  # type: ignore[arg-type]
    return bands.resize(PLOT_SIZE, Image.Resampling.BOX)
