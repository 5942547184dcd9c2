"""How a mask is to be made: everything that may differ between two jobs of one mode."""

from dataclasses import dataclass
from typing import Literal

Resize = Literal["fit", "published"]

MAX_OVERLAP = 0.5
"""Of a tile's side; with more, every pixel would be computed four times and more."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The same recipe, image and weights give the same mask.

    `input_size` N: the model sees about N×N pixels, by default the mode's own number. `resize`: "fit" keeps to that
    number whatever the aspect; "published" resizes as the model's published evaluation did. `tta`: the published
    multi-scale protocol, six sizes and each also mirrored, averaged (17 times the work). `tiles`: the image is shown
    at its own resolution in tiles of N×N pixels that share `tile_overlap` of their sides. `confidence`: also say how
    sure each pixel is. Pixels surer than `unlabeled_below` (0 to 1) keep their class, the others get id 0. Raises
    ValueError for what does not go together.
    """

    input_size: int | None = None
    resize: Resize = "fit"
    tta: bool = False
    tiles: bool = False
    tile_overlap: float = 0.25
    confidence: bool = False
    unlabeled_below: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.unlabeled_below <= 1:
            raise ValueError(f"unlabeled_below {self.unlabeled_below} is not between 0 and 1")
        if not 0 <= self.tile_overlap <= MAX_OVERLAP:
            raise ValueError(f"tile_overlap {self.tile_overlap} is not between 0 and {MAX_OVERLAP}")
        if self.resize == "published" and self.input_size is not None:
            raise ValueError('resize "published" has an input size of its own: leave input_size out')
        if self.resize == "published" and self.tiles:
            raise ValueError('tiles show the image at its own resolution: leave resize "published" out')


DEFAULT = Recipe()
