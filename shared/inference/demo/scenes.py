"""Drawn landscapes with exact masks: what the demo model is trained on, tested on and shown with.

A seed is a place; `time_seconds` moves its cars, clouds, sun and ripples, so a place is also a recording. Numpy and
Pillow only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.inference.demo.canvas import OVERSAMPLING, Canvas, Colour, Points, mix, vary, waves
from shared.inference.demo.figures import HOUSE, TREE, draw_broadleaf, draw_car, draw_conifer, draw_house

SKY, SUN, HILL, GRASS, ROAD, WATER = range(1, 7)
"""Class ids, as in labels.DEMO; those of the things are in figures."""

_MOODS: tuple[tuple[Colour, Colour, Colour, Colour], ...] = (
    # upper sky, sky at the horizon, grass, light
    ((66, 135, 214), (190, 222, 240), (104, 168, 66), (255, 252, 240)),
    ((84, 116, 190), (250, 205, 160), (122, 152, 62), (255, 236, 205)),
    ((120, 160, 200), (222, 228, 226), (112, 150, 84), (238, 242, 248)),
    ((54, 96, 176), (244, 168, 132), (98, 136, 66), (255, 222, 196)),
    ((98, 180, 226), (214, 238, 234), (140, 182, 72), (255, 255, 246)),
)
_CAR_COLOURS: tuple[Colour, ...] = (
    (206, 48, 44), (38, 92, 182), (238, 238, 236), (246, 190, 44), (44, 48, 56), (40, 140, 120), (170, 176, 184),
)  # fmt: skip
_WALL_COLOURS: tuple[Colour, ...] = (
    (236, 224, 200), (214, 170, 128), (196, 104, 80), (240, 240, 234), (176, 196, 208), (226, 200, 140),
)  # fmt: skip
_ROOF_COLOURS: tuple[Colour, ...] = ((158, 62, 46), (98, 70, 62), (86, 92, 108), (180, 98, 54))
_LEAF_COLOURS: tuple[Colour, ...] = ((46, 104, 52), (62, 124, 58), (38, 86, 62), (88, 128, 48), (150, 112, 42))


@dataclass(frozen=True)
class Scene:
    """An image, uint8 RGB (height, width, 3), and its exact mask, uint8 (height, width) of class ids."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def draw_scene(seed: int, *, width: int = 640, height: int = 480, time_seconds: float = 0.0) -> Scene:
    """The place `seed` at a moment, at any size; the same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    mood = _MOODS[rng.integers(len(_MOODS))]
    place = _Place(
        canvas=Canvas(width, height),
        rng=rng,
        horizon=rng.uniform(0.36, 0.52),
        upper=vary(rng, mood[0], 14),
        lower=vary(rng, mood[1], 10),
        grass=vary(rng, mood[2], 14),
        light=mood[3],
        time=time_seconds,
    )
    _draw_sky(place)
    _draw_hills(place)
    lake = _draw_ground(place)
    things = _place_cars(place, _draw_road(place)) + _place_plants_and_houses(place, lake)
    for _, draw in sorted(things, key=lambda thing: thing[0]):
        draw()
    return _finish(place, seed)


@dataclass(frozen=True)
class _Place:
    """What every part of a scene needs to know of the whole."""

    canvas: Canvas
    rng: np.random.Generator
    horizon: float
    upper: Colour
    lower: Colour
    grass: Colour
    light: Colour
    time: float

    def scale(self, base: float) -> float:
        """How large a thing looks that stands at height `base` of the picture: the nearer, the larger."""
        return 0.28 + 0.95 * max(0.0, base - self.horizon) / (1 - self.horizon)


Lake = tuple[float, float, float, float]
"""Centre and half axes; zeros where there is none."""
Thing = tuple[float, Callable[[], None]]
"""Something that stands at a height of the picture, and how to draw it; the lower ones hide the higher ones."""


def _draw_sky(place: _Place) -> None:
    canvas, rng = place.canvas, place.rng
    bands = 48
    for band in range(bands):
        share = (band / bands) ** 0.8
        canvas.box(-0.1, band / bands, canvas.breadth + 0.1, 1.0 + 1 / bands, mix(place.upper, place.lower, share), SKY)
    x, y = rng.uniform(0.1, 0.9) * canvas.breadth, rng.uniform(0.08, 0.22)
    x += 0.004 * place.time
    radius = rng.uniform(0.035, 0.065)
    disc = (255, 244, rng.uniform(120, 200))
    for halo in range(5, 0, -1):
        sky = mix(place.upper, place.lower, y)
        canvas.ellipse(x, y, radius * (1 + 0.22 * halo), radius * (1 + 0.22 * halo), mix(disc, sky, 0.45 + halo / 10))
    canvas.ellipse(x, y, radius, radius, disc, SUN)
    for _ in range(rng.integers(2, 6)):
        _draw_cloud(place)


def _draw_cloud(place: _Place) -> None:
    canvas, rng = place.canvas, place.rng
    size = rng.uniform(0.03, 0.08)
    span = canvas.breadth + 0.8
    x = (rng.uniform(0, span) + rng.uniform(0.01, 0.03) * place.time) % span - 0.4
    y = rng.uniform(0.04, place.horizon - 0.12)
    puffs = rng.uniform(-1, 1, (rng.integers(4, 8), 3))
    for white in (0.55, 0.85):
        colour = mix(mix(place.upper, place.lower, y), place.light, white)
        for across, up, wide in puffs:
            lift = -0.3 * size if white > 0.6 else 0.0
            canvas.ellipse(
                x + across * size * 1.4,
                y + up * size * 0.25 + lift,
                size * (0.95 + 0.4 * wide),
                size * 0.5,
                colour,
                SKY,
            )


def _draw_hills(place: _Place) -> None:
    rng = place.rng
    layers = rng.integers(1, 4)
    for layer in range(layers):
        near = (layer + 1) / layers
        rise = place.horizon - rng.uniform(0.05, 0.14) * (1.35 - near)
        line = waves(rng, 4, 0.05)
        colour = mix(mix((96, 100, 150), place.lower, 0.25), (88, 122, 104), near * 0.8)
        place.canvas.under(
            lambda x, rise=rise, line=line: rise + line(x),  # type: ignore[misc]
            place.horizon + 0.06,
            vary(rng, mix(place.lower, colour, 0.55 + 0.35 * near), 6),
            HILL,
        )


def _draw_ground(place: _Place) -> Lake:
    canvas, rng = place.canvas, place.rng
    edge = waves(rng, 3, 0.012)
    canvas.under(lambda x: place.horizon + edge(x), 1.1, mix(place.grass, place.lower, 0.25), GRASS)
    for step in range(1, 12):
        share = step / 12
        fold = waves(rng, 2, 0.01)
        canvas.under(
            lambda x, share=share, fold=fold: place.horizon + (1 - place.horizon) * share**1.3 + fold(x) + 0.01,  # type: ignore[misc]
            1.1,
            vary(rng, mix(mix(place.grass, place.lower, 0.22), place.grass, share), 5),
            GRASS,
        )
    return _draw_lake(place) if rng.random() < 0.8 else (0.0, 0.0, 0.0, 0.0)


def _draw_lake(place: _Place) -> Lake:
    canvas, rng = place.canvas, place.rng
    x, y = rng.uniform(0.1, 0.9) * canvas.breadth, place.horizon + rng.uniform(0.08, 0.16)
    across, down = rng.uniform(0.25, 0.6), rng.uniform(0.04, 0.08)
    wobble = waves(rng, 3, 0.14, closed=True)
    angles = np.linspace(0, math.tau, 60)
    shore = [
        (x + across * math.cos(a) * (1 + wobble(a / math.tau)), y + down * math.sin(a) * (1 + wobble(a / math.tau)))
        for a in map(float, angles)
    ]
    bank = [(x + (px - x) * 1.03, y + (py - y) * 1.08) for px, py in shore]
    canvas.polygon(bank, mix(place.grass, (196, 178, 130), 0.7))
    water = mix((52, 110, 158), place.upper, 0.35)
    canvas.polygon(shore, vary(rng, water, 8), WATER)
    return x, y, across, down


def _draw_road(place: _Place) -> tuple[Callable[[float], float], float]:
    """A road across the picture; its middle line y(x), x in 0..1, and half its height."""
    canvas, rng = place.canvas, place.rng
    middle = rng.uniform(0.68, 0.82)
    half = rng.uniform(0.042, 0.06)
    bend = waves(rng, 2, 0.02)
    tar = vary(rng, (104, 104, 110), 8)

    def line(x: float) -> float:
        return middle + bend(x)

    def band(x0: float, x1: float, above: float, below: float) -> Points:
        xs = [x0 + (x1 - x0) * k / 40 for k in range(41)]
        top = [(x * canvas.breadth, line(x) + above) for x in xs]
        return top + [(x * canvas.breadth, line(x) + below) for x in reversed(xs)]

    canvas.polygon(band(-0.05, 1.05, -half * 1.12, half * 1.12), mix(tar, (206, 200, 186), 0.6), ROAD)
    canvas.polygon(band(-0.05, 1.05, -half, half), tar, ROAD)
    dashes = max(4, round(9 * canvas.breadth))
    for dash in range(dashes):
        start = (dash + 0.2) / dashes
        canvas.polygon(band(start, start + 0.5 / dashes, -half * 0.06, half * 0.06), (232, 228, 214), ROAD)
    return line, half


def _place_cars(place: _Place, road: tuple[Callable[[float], float], float]) -> list[Thing]:
    canvas, rng = place.canvas, place.rng
    line, half = road
    things: list[Thing] = []
    for lane, direction in ((-0.45, -1.0), (0.55, 1.0)):
        speed = direction * rng.uniform(0.12, 0.22)
        gap = rng.uniform(0.45, 0.75)
        count = max(1, int(canvas.breadth / gap))
        span = count * gap + 0.3
        start = rng.uniform(0, span)
        for number in range(count):
            x = (start + number * gap + speed * place.time) % (canvas.breadth + span) - 0.3
            base = line(x / canvas.breadth) + lane * half
            look = (rng.uniform(0.85, 1.15), vary(rng, _CAR_COLOURS[rng.integers(len(_CAR_COLOURS))], 8))
            if rng.random() < 0.9:
                things.append((base, _later(draw_car, canvas, x, base, half * 1.55 * look[0], direction, look[1])))
    return things


def _later(draw: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: draw(*arguments)


def _place_plants_and_houses(place: _Place, lake: Lake) -> list[Thing]:
    canvas, rng = place.canvas, place.rng
    middle_x, middle_y, across, down = lake

    def is_dry(x: float, base: float, reach: float) -> bool:
        return abs(x - middle_x) > across * 1.1 + reach or not -1.2 * down < base - middle_y < 1.5 * down

    things: list[Thing] = []
    for _ in range(rng.integers(3, 6 + round(2 * canvas.breadth))):
        base = place.horizon + rng.uniform(0.05, 0.62) * (0.72 - place.horizon)
        x = rng.uniform(0, 1) * canvas.breadth
        wall, roof = rng.integers(len(_WALL_COLOURS)), rng.integers(len(_ROOF_COLOURS))
        size = rng.uniform(0.16, 0.26) * place.scale(base)
        looks = (vary(rng, _WALL_COLOURS[wall], 8), vary(rng, _ROOF_COLOURS[roof], 8), rng.uniform(0.8, 1.5))
        if is_dry(x, base, size / 2):
            things.append((base, _later(draw_house, canvas, x, base, size, *looks)))
    for _ in range(rng.integers(5, 10 + round(5 * canvas.breadth))):
        far = rng.random() < 0.75
        base = place.horizon + 0.01 + rng.uniform(0, 0.9) * (0.68 - place.horizon) if far else rng.uniform(0.9, 1.06)
        x = rng.uniform(-0.02, 1.02) * canvas.breadth
        size = rng.uniform(0.14, 0.3) * place.scale(base)
        leaves = vary(rng, _LEAF_COLOURS[rng.integers(len(_LEAF_COLOURS))], 10)
        puffs = rng.uniform(-1, 1, (9, 3))
        draw = draw_conifer if rng.random() < 0.4 else draw_broadleaf
        if is_dry(x, base, 0.0):
            things.append((base, _later(draw, canvas, x, base, size, leaves, puffs)))
    return things


def _finish(place: _Place, seed: int) -> Scene:
    """Average down, then give every class its grain and the whole its light and a camera's noise."""
    width, height = place.canvas.size
    image = np.asarray(place.canvas.picture.reduce(OVERSAMPLING), dtype=np.float32)
    labels = np.asarray(place.canvas.mask)[OVERSAMPLING // 2 :: OVERSAMPLING, OVERSAMPLING // 2 :: OVERSAMPLING]
    grain = np.zeros(256, dtype=np.float32)
    grain[[HILL, GRASS, ROAD, TREE, HOUSE]] = (7, 13, 5, 12, 4)
    texture = _noise(place.rng, width, height, 96) + _noise(place.rng, width, height, 40)
    image = image + (texture * grain[labels])[:, :, None]
    rows = np.arange(height, dtype=np.float32)[:, None] / height
    across = np.arange(width, dtype=np.float32)[None, :] / height
    ripples = np.sin(rows * 420 + 5 * np.sin(across * 9 + place.time) + 2 * place.time) * 7 * (labels == WATER)
    image = (image + ripples[:, :, None]) * (np.array(place.light, dtype=np.float32) / 255)
    moment = np.random.default_rng((seed, round(place.time * 1000)))
    image += moment.normal(0, 2.5, image.shape).astype(np.float32)
    return Scene(image=np.clip(image, 0, 255).astype(np.uint8), labels=labels.copy())


def _noise(rng: np.random.Generator, width: int, height: int, cells: int) -> NDArray[np.float32]:
    """Smooth noise of about unit size whose cells are a fixed part of the picture, so it does not change with size."""
    grid = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
