"""Files of two folders that belong together because their names agree but for the ending."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.failures import Failure, Misuse
from cli.images import find_files


@dataclass(frozen=True, kw_only=True)
class Pair:
    name: str
    source: Path
    """The image, or the mask that was made of it."""
    label: Path


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """By name; what has no partner is named beside them."""

    found: list[Pair]
    without_label: list[str]
    without_source: list[str]


def pair(sources: Path, labels: Path, *, source_suffixes: tuple[str, ...], only: Sequence[str] | None = None) -> Pairs:
    """Raises Misuse for a folder without such files or with two of one name, and Failure when nothing agrees.

    `only` are the names that count, as benchmarks list those of a split.
    """
    left = _index(sources, suffixes=source_suffixes)
    right = _index(labels, suffixes=(".png",))
    names = sorted(left.keys() | right.keys() if only is None else set(only))
    found = [Pair(name=name, source=left[name], label=right[name]) for name in names if name in left and name in right]
    if not found:
        raise Failure(f"no name in {sources} is one in {labels}: a.png is the label of a.jpg")
    return Pairs(
        found=found,
        without_label=[name for name in names if name not in right],
        without_source=[name for name in names if name not in left],
    )


def read_names(path: Path) -> list[str]:
    """The first word of each line: what else VOC's lists say of an image is not needed."""
    names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not names:
        raise Misuse(f"{path} holds no names")
    return names


def _index(folder: Path, *, suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in find_files(folder, suffixes=suffixes):
        if path.stem in found:
            raise Misuse(f"{found[path.stem]} and {path} have one name: which of them is meant cannot be told")
        found[path.stem] = path
    return found
