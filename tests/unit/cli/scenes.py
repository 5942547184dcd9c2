"""Drawn scenes as files: images, and the truth of each under the same name."""

from pathlib import Path

from shared.inference.demo.scenes import Scene, draw_scene
from shared.inference.masks import encode_mask, encode_png

UNSEEN = 6_000_000
"""Seeds from here on were neither trained on nor measured by the training script."""


def write_scenes(folder: Path, *, count: int) -> dict[str, Scene]:
    """`images/a.png` and `labels/a.png`, b and so on, of unlike sizes."""
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    scenes = {}
    for number in range(count):
        name, (width, height) = "abcdefgh"[number], ((320, 240), (400, 225), (240, 320))[number % 3]
        scenes[name] = draw_scene(UNSEEN + number, width=width, height=height)
        (folder / "images" / f"{name}.png").write_bytes(encode_png(scenes[name].image))
        (folder / "labels" / f"{name}.png").write_bytes(encode_mask(scenes[name].labels))
    return scenes
