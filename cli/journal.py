"""What `maskline archive` remembers in its out folder, so that it may be killed at any moment and started again.

One small JSON file for each recording, replaced at once, and one for what all have in common. An entry is written
before the bytes of its upload are sent and again once its job is known; a job that was accepted in between is found by
its Idempotency-Key, which is made of nothing but the entry.
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cli import downloads
from cli.failures import Failure, Misuse

FOLDER = ".archive"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of one recording. `name` is its path below the source, with slashes."""

    name: str
    size_bytes: int | None
    mtime_ns: int | None = None
    upload_id: str | None = None
    submission: int = 0
    """How many jobs the upload became before this one."""
    job_id: str | None = None
    frames: int | None = None
    seconds: float | None = None
    """Of the job, once its result is here."""

    @property
    def idempotency_key(self) -> str:
        return f"archive-{self.upload_id}-{self.submission}"


@dataclass(frozen=True, kw_only=True)
class Common:
    """What holds for all recordings of an archive."""

    source: str
    mode: str
    options: Mapping[str, Any]
    batch_key: str
    """The Idempotency-Key of the batch, where there is one."""
    batch_id: str | None = None


class Journal:
    """Only for who holds its lock: see `open_journal`. Different entries may be written from different threads."""

    def __init__(self, folder: Path, common: Common) -> None:
        self.common = common
        self._folder = folder

    def keep(self, common: Common) -> None:
        self.common = common
        _write(self._folder / "archive.json", asdict(common))

    def read(self, name: str) -> Entry | None:
        path = self._place(name)
        return _read(path, Entry) if path.exists() else None

    def write(self, entry: Entry) -> None:
        _write(self._place(entry.name), asdict(entry))

    def forget(self, name: str) -> None:
        self._place(name).unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        found = [_read(path, Entry) for path in (self._folder / "recordings").glob("*.json")]
        return sorted(found, key=lambda entry: entry.name)

    def _place(self, name: str) -> Path:
        """A name may be longer, with what is in it, than a file's may be."""
        return self._folder / "recordings" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"


def has_journal(out: Path) -> bool:
    return (out / FOLDER / "archive.json").is_file()


@contextmanager
def open_journal(out: Path, *, source: str, mode: str, options: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of the out folder, which nobody else has open until the block ends or the process dies.

    Raises Failure while another process has it, and Misuse when it is that of another source, mode or options: the
    results of both would lie in the same place.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(f"another `maskline archive` is at work on {out}") from error
        for each in (folder, folder / "recordings"):
            downloads.sweep(each)
        path = folder / "archive.json"
        wanted = Common(source=source, mode=mode, options=options, batch_key=f"archive-{uuid.uuid4().hex}")
        journal = Journal(folder, _read(path, Common) if path.exists() else wanted)
        if differing := _compare(journal.common, wanted):
            if journal.common.batch_id is not None or journal.entries():
                raise Misuse(f"{out} holds an archive with {differing}: choose another --out")
            journal.common = wanted  # nothing came of what was typed before
        journal.keep(journal.common)
        yield journal


def _compare(before: Common, now: Common) -> str:
    """What is not the same, for a person; empty where all is."""
    pairs = [(what, getattr(before, what), getattr(now, what)) for what in ("source", "mode", "options")]
    return ", ".join(f"{what} {json.dumps(old)}, not {json.dumps(new)}" for what, old, new in pairs if old != new)


def _read(path: Path, kind: type[Any]) -> Any:
    try:
        return kind(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise Failure(f"{path} cannot be understood; delete it, and what it is about is done anew") from error


def _write(path: Path, content: Mapping[str, Any]) -> None:
    downloads.write(path, json.dumps(content, indent=1).encode() + b"\n")
