"""The things of a scene: a car, a house, two kinds of tree. Each stands at `base` and is `height` or `size` tall."""

import numpy as np
from numpy.typing import NDArray

from shared.inference.demo.canvas import Canvas, Colour, mix

TREE, HOUSE, CAR = range(7, 10)
"""Class ids, as in labels.DEMO."""


def draw_car(canvas: Canvas, x: float, base: float, height: float, direction: float, colour: Colour) -> None:
    long = height * 2.2
    canvas.ellipse(x, base, long * 0.54, height * 0.12, (52, 54, 58))
    body = [(-0.5, -0.2), (-0.5, -0.55), (-0.36, -0.6), (0.3, -0.6), (0.5, -0.5), (0.5, -0.2)]
    cabin = [(-0.34, -0.58), (-0.24, -0.95), (0.1, -0.98), (0.28, -0.58)]
    glass = [(-0.27, -0.6), (-0.2, -0.88), (-0.07, -0.9), (-0.07, -0.6)]
    front = [(-0.03, -0.6), (-0.03, -0.9), (0.08, -0.91), (0.2, -0.6)]
    for outline, fill in (
        (cabin, colour),
        (body, colour),
        (glass, (150, 190, 212)),
        (front, (150, 190, 212)),
    ):
        canvas.polygon([(x + direction * px * long, base + py * height) for px, py in outline], fill, CAR)
    for wheel in (-0.28, 0.28):
        canvas.ellipse(x + wheel * long, base - 0.17 * height, height * 0.2, height * 0.2, (28, 28, 32), CAR)
        canvas.ellipse(x + wheel * long, base - 0.17 * height, height * 0.09, height * 0.09, (168, 168, 172), CAR)


def draw_house(canvas: Canvas, x: float, base: float, size: float, wall: Colour, roof: Colour, breadth: float) -> None:
    half, eaves, ridge = size * breadth / 2, base - size * 0.6, base - size
    canvas.ellipse(x + half * 0.2, base, half * 1.25, size * 0.06, (70, 96, 58))
    canvas.box(x + half * 0.35, ridge - size * 0.05, x + half * 0.55, eaves, mix(wall, (90, 60, 50), 0.6), HOUSE)
    canvas.box(x - half, eaves, x + half, base, wall, HOUSE)
    canvas.box(x + half * 0.55, eaves, x + half, base, mix(wall, (60, 60, 80), 0.25), HOUSE)
    canvas.polygon(
        [(x - half * 1.15, eaves), (x - half * 0.7, ridge), (x + half * 0.7, ridge), (x + half * 1.15, eaves)],
        roof,
        HOUSE,
    )
    canvas.box(x - half * 0.14, base - size * 0.34, x + half * 0.14, base, mix(roof, (40, 30, 30), 0.5), HOUSE)
    for side in (-0.6, 0.55):
        left = x + half * side - half * 0.16
        canvas.box(left, base - size * 0.46, left + half * 0.34, base - size * 0.22, (250, 250, 244), HOUSE)
        inner = half * 0.05
        canvas.box(
            left + inner, base - size * 0.43, left + half * 0.34 - inner, base - size * 0.25, (96, 136, 166), HOUSE
        )


def draw_broadleaf(
    canvas: Canvas, x: float, base: float, size: float, leaves: Colour, puffs: NDArray[np.float64]
) -> None:
    trunk = (104, 76, 50)
    canvas.ellipse(x + size * 0.06, base, size * 0.34, size * 0.05, (62, 88, 50))
    canvas.box(x - size * 0.055, base - size * 0.5, x + size * 0.055, base, trunk, TREE)
    middle = base - size * 0.66
    for shade, lift in ((-22.0, 0.05), (0.0, 0.0), (20.0, -0.07)):
        colour = (leaves[0] + shade, leaves[1] + shade, leaves[2] + shade * 0.7)
        for across, up, wide in puffs:
            reach = 0.26 - 0.08 * (lift < 0)
            canvas.ellipse(
                x + across * size * reach,
                middle + up * size * 0.2 + lift * size,
                size * (0.16 + 0.04 * wide - 0.05 * (lift < 0)),
                size * (0.14 + 0.04 * wide - 0.05 * (lift < 0)),
                colour,
                TREE,
            )


def draw_conifer(
    canvas: Canvas, x: float, base: float, size: float, leaves: Colour, puffs: NDArray[np.float64]
) -> None:
    canvas.ellipse(x + size * 0.05, base, size * 0.26, size * 0.04, (62, 88, 50))
    canvas.box(x - size * 0.04, base - size * 0.25, x + size * 0.04, base, (94, 68, 46), TREE)
    for tier in range(4):
        low = base - size * (0.12 + 0.2 * tier)
        half = size * (0.27 - 0.05 * tier) * (1 + 0.1 * float(puffs[tier, 0]))
        top = low - size * 0.34
        colour = (leaves[0] - 18 + 9 * tier, leaves[1] - 18 + 9 * tier, leaves[2] - 8 + 5 * tier)
        canvas.polygon([(x - half, low), (x, top), (x + half, low)], colour, TREE)
        canvas.polygon([(x, top), (x + half, low), (x + half * 0.2, low)], mix(colour, (20, 40, 40), 0.25), TREE)
