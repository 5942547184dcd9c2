"""The images in a folder, as the commands that work without a service find them."""

from collections.abc import Iterable
from pathlib import Path

from cli.failures import Misuse

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
"""Of what shared.inference.media reads."""


def expand(paths: Iterable[Path]) -> list[Path]:
    """The files themselves and, of a folder, the images in it; each once. Misuse for a folder without any."""
    found: dict[Path, Path] = {}
    for path in paths:
        for file in find_files(path, suffixes=SUFFIXES) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def find_files(folder: Path, *, suffixes: tuple[str, ...]) -> list[Path]:
    """Those in the folder itself, by name, hidden ones left out. Misuse where there is none."""
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise Misuse(f"{folder} holds no {', '.join(suffixes)}; folders in it are not searched")
    return files
