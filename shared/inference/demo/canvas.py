"""Drawing a picture and its mask at once, with the same outlines, and mixing colours for it."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

OVERSAMPLING = 2
"""Everything is drawn this much larger and averaged, so that edges look like a camera's."""

Colour = tuple[float, float, float]
Points = Sequence[tuple[float, float]]


class Canvas:
    """A picture and its mask, drawn with the same outlines. Coordinates: 0..1 down, and across in the same unit."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        large = (width * OVERSAMPLING, height * OVERSAMPLING)
        self.picture = Image.new("RGB", large)
        self.mask = Image.new("L", large)
        self._paint = ImageDraw.Draw(self.picture)
        self._mark = ImageDraw.Draw(self.mask)
        self._unit = large[1]
        self.breadth = width / height

    def polygon(self, points: Points, colour: Colour, class_id: int | None = None) -> None:
        """Fill an outline; without a class, only the picture changes and what lies there keeps its own."""
        outline = [(x * self._unit, y * self._unit) for x, y in points]
        self._paint.polygon(outline, fill=rgb(colour))
        if class_id is not None:
            self._mark.polygon(outline, fill=class_id)

    def ellipse(
        self, x: float, y: float, across: float, down: float, colour: Colour, class_id: int | None = None
    ) -> None:
        """Fill an ellipse given by its centre and half axes."""
        box = [(x - across) * self._unit, (y - down) * self._unit, (x + across) * self._unit, (y + down) * self._unit]
        self._paint.ellipse(box, fill=rgb(colour))
        if class_id is not None:
            self._mark.ellipse(box, fill=class_id)

    def box(
        self, left: float, top: float, right: float, bottom: float, colour: Colour, class_id: int | None = None
    ) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, class_id)

    def under(self, line: Callable[[float], float], bottom: float, colour: Colour, class_id: int) -> None:
        """Fill from a line y(x), x in 0..1 across the picture, down to `bottom`."""
        xs = np.linspace(-0.02, 1.02, 80)
        ridge = [(float(x) * self.breadth, line(float(x))) for x in xs]
        self.polygon([*ridge, (1.02 * self.breadth, bottom), (-0.02 * self.breadth, bottom)], colour, class_id)


def rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (int(min(255.0, max(0.0, value))) for value in colour)
    return red, green, blue


def vary(rng: np.random.Generator, colour: Colour, amount: float) -> Colour:
    """The colour a little lighter or darker, and a little off."""
    shift = rng.normal(0, amount) + rng.normal(0, amount / 3, 3)
    return colour[0] + shift[0], colour[1] + shift[1], colour[2] + shift[2]


def mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (a + (b - a) * share for a, b in zip(one, other, strict=True))
    return red, green, blue


def waves(rng: np.random.Generator, count: int, height: float, *, closed: bool = False) -> Callable[[float], float]:
    """A smooth random line around 0 with about `height` of relief; `closed` makes both ends meet."""
    parts = [
        (
            height * rng.uniform(0.4, 1) / (k + 1),
            (1.0 if closed else rng.uniform(0.6, 1.5)) * (k + 1),
            rng.uniform(0, math.tau),
        )
        for k in range(count)
    ]
    return lambda x: sum(size * math.sin(math.tau * often * x + phase) for size, often, phase in parts)
