"""Files of a result on this machine's disk: whole and right, or not there at all."""

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import httpx2

from cli.failures import Failure

BLOCK_BYTES = 2**20


class Damaged(Exception):
    """What came is not what the manifest promises, or did not come; another try may do better."""


def fetch(
    http: httpx2.Client,
    file: Mapping[str, Any],
    folder: Path,
    *,
    on_bytes: Callable[[int], None] = lambda _count: None,
) -> Path:
    """Download one file of a manifest by its link, and put it in its place if size and SHA-256 are right.

    One that is there already, and right, is left alone. `on_bytes` is told of every block, and may raise to give the
    download up. Raises Damaged, and Failure for a name that would lead out of the folder.
    """
    name = str(file["name"])
    if Path(name).name != name or name in ("", ".", ".."):
        raise Failure(f"the manifest names a file {name!r}, which is no plain file name")
    if _is_there(folder / name, file):
        return folder / name

    def receive(part: BinaryIO) -> None:
        digest, size = hashlib.sha256(), 0
        try:
            with http.stream("GET", file["url"]) as answer:
                if answer.status_code != 200:
                    raise Damaged(f"the storage answered {answer.status_code}")
                for block in answer.iter_bytes(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    part.write(block)
                    on_bytes(len(block))
        except httpx2.TransportError as error:
            raise Damaged(f"the storage cannot be reached: {error}") from error
        if size != file["size"] or digest.hexdigest() != file["sha256"]:
            raise Damaged(f"what came is not what the manifest promises ({size} of {file['size']} bytes)")

    return _place(folder / name, receive)


def write(path: Path, content: bytes) -> Path:
    """Replace the file at once."""

    def fill(part: BinaryIO) -> None:
        part.write(content)

    return _place(path, fill)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed had not put in its place yet. Only for who is alone in the folder."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}", path.name):
            path.unlink(missing_ok=True)


def _is_there(path: Path, file: Mapping[str, Any]) -> bool:
    try:
        with path.open("rb") as content:
            if path.stat().st_size != file["size"]:
                return False
            return hashlib.file_digest(content, "sha256").hexdigest() == str(file["sha256"])
    except OSError:
        return False


def _place(path: Path, fill: Callable[[BinaryIO], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part_path = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with part_path.open("xb") as part:
            fill(part)
            part.flush()
            os.fsync(part.fileno())  # or a machine that stops may keep the name without the bytes
        part_path.replace(path)
    except BaseException:
        part_path.unlink(missing_ok=True)
        raise
    return path
