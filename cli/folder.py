"""What is in a folder of recordings. A recording is told by its first bytes; its name says nothing."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cli.journal import has_journal
from shared.inference.signatures import HEAD_BYTES, find_container


@dataclass(frozen=True, kw_only=True)
class Found:
    """By path below the folder, with slashes."""

    recordings: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    """With the reason; files, and folders that could not be looked into."""


def search(folder: Path) -> Found:
    """All files below the folder, in the order of their names.

    Hidden files and folders are left out, and folders that hold an archive: its masks are recordings too. Links to
    folders are not followed. Raises OSError when the folder itself cannot be read.
    """
    found = Found()

    def note(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        found.unreadable[_name(Path(error.filename), folder)] = error.strerror or str(error)

    for where, folders, files in os.walk(folder, onerror=note):
        folders[:] = [each for each in folders if not each.startswith(".") and not has_journal(Path(where) / each)]
        for path in (Path(where) / each for each in files if not each.startswith(".")):
            name = _name(path, folder)
            try:
                (found.recordings if _is_recording(path) else found.others).append(name)
            except OSError as error:
                found.unreadable[name] = error.strerror or str(error)
    found.recordings.sort()
    found.others.sort()
    return found


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _is_recording(path: Path) -> bool:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for whoever writes into it
        return False
    with path.open("rb") as file:
        return find_container(file.read(HEAD_BYTES)) is not None
