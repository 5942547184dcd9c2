"""Recordings on their way through the service: brought, followed until they end, their results fetched.

Where their jobs come from is `cli/origins.py`. All that is decided is decided in one thread; uploads and downloads are
done in others, which put what became of them into an inbox. Everything may be interrupted anywhere: what is in its
place is whole, and the journal knows the rest.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from cli import downloads
from cli.client import LOOK_SECONDS, OUTAGE_SECONDS, TERMINAL, Client, NotDownloaded
from cli.exchange import BUSY, ApiError, ServiceUnreachable
from cli.failures import Failure
from cli.journal import FOLDER, Entry, Journal
from cli.progress import Bars

Json: TypeAlias = dict[str, Any]
Made = TypeVar("Made")

STOP_SECONDS = 5.0
"""How long an interrupted command waits for what it has under way."""
NOT_A_RECORDING = "not a recording"


@dataclass(frozen=True, kw_only=True)
class Row:
    """How it ended with one file; `says` is where its result is, or why there is none."""

    name: str
    state: str
    frames: int | None = None
    seconds: float | None = None
    says: str = ""

    @property
    def failed(self) -> bool:
        return self.state not in ("succeeded", NOT_A_RECORDING)


@dataclass
class Recording:
    name: str
    size_bytes: int | None
    job: Json | None = None
    sent_bytes: int = 0
    lost: bool = False
    """Whether the service has forgotten its job once; it is not brought a third time."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def frames_done(self) -> int:
        return self.job["progress"]["done"] or 0 if self.job is not None else 0

    @property
    def frames(self) -> int | None:
        total: int | None = self.job["progress"]["total"] if self.job is not None else None
        return total


class Stopped(Exception):
    """The command was interrupted; what is under way ends."""


class Work:
    """The recordings of an archive that have not ended yet, and how it ended with the others."""

    def __init__(self, client: Client, journal: Journal, out: Path, bars: Bars, *, parallel: int) -> None:
        self.rows: list[Row] = []
        self.recordings: dict[str, Recording] = {}
        """All that are worked on by this run; `open` has those whose end is not known."""
        self.open: dict[str, Recording] = {}
        self._client, self._journal, self._out, self._bars = client, journal, out, bars
        self._inbox: queue.SimpleQueue[tuple[Recording, Json | Row | BaseException]] = queue.SimpleQueue()
        self._uploads = ThreadPoolExecutor(parallel, thread_name_prefix="bring")
        self._downloads = ThreadPoolExecutor(parallel, thread_name_prefix="fetch")
        self._under_way: set[Future[None]] = set()
        self._stopping = threading.Event()

    def run(self, look: Callable[[], bool]) -> None:
        """Until all have ended.

        `look` tells `see` again and again how the jobs are, and says whether there may be more than are known. Raises
        ServiceUnreachable and ApiError when the service is away for OUTAGE_SECONDS, or does not let us in.
        """
        reached_at, next_look, more = time.monotonic(), 0.0, True
        while self.open or more:
            try:
                recording, outcome = self._inbox.get(timeout=max(0.0, next_look - time.monotonic()))
            except queue.Empty:
                began = time.monotonic()
                try:
                    more = look()
                    reached_at = time.monotonic()
                except (ServiceUnreachable, ApiError) as error:
                    if not _is_away(error) or time.monotonic() - reached_at > OUTAGE_SECONDS:
                        raise
                # A look at thousands of jobs takes its time, of which the service shall have as much for others.
                next_look = time.monotonic() + max(LOOK_SECONDS, time.monotonic() - began)
                self._sum_up()
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            if isinstance(outcome, Row):
                self.end(outcome)
            else:
                self.see(recording, outcome)

    def stop(self) -> bool:
        """End what is under way; whether that was done within STOP_SECONDS."""
        self._stopping.set()
        for pool in (self._uploads, self._downloads):
            pool.shutdown(wait=False, cancel_futures=True)
        return not wait_for(tuple(self._under_way), timeout=STOP_SECONDS).not_done

    def bring(self, recording: Recording, act: Callable[[Recording], Json]) -> None:
        """Have its job made by `act`, as soon as it is its turn."""
        self.recordings[recording.name] = self.open[recording.name] = recording
        recording.job, recording.sent_bytes = None, 0
        self._start(self._uploads, recording, act)

    def see(self, recording: Recording, job: Json) -> None:
        """Take note of how its job is now."""
        if recording.name not in self.open and recording.name in self.recordings:
            return  # an older look, at one that has ended meanwhile
        if recording.job is not None and recording.job["state"] in TERMINAL:
            return  # its result is on its way
        self.recordings[recording.name] = self.open[recording.name] = recording
        before = recording.frames_done if recording.job is not None else None
        recording.job = job
        if before is not None:
            self._bars.count_frames(recording.frames_done - before)
        if job["state"] == "succeeded":
            self._start(self._downloads, recording, self._fetch)
        elif job["state"] in TERMINAL:
            error = job["error"]
            says = f"{error['code']}: {error['detail']}" if error else ""
            state = NOT_A_RECORDING if is_other(job) else job["state"]
            self.end(Row(name=recording.name, state=state, seconds=job["timing"]["total_seconds"], says=says))
        else:
            self._bars.follow(recording.name, job)

    def end(self, row: Row) -> None:
        """It is known how it ended with one file."""
        self.open.pop(row.name, None)
        self.rows.append(row)
        self._bars.end(row.name, row.state, row.says)

    def persist(self, recording: Recording, act: Callable[[], Made]) -> Made:
        """Do it through an outage, which may last OUTAGE_SECONDS from when it last got further."""
        furthest, since = -1, 0.0
        while True:
            try:
                return act()
            except (Failure, OSError) as error:
                if self._stopping.is_set():
                    raise Stopped from error
                if recording.sent_bytes > furthest:
                    furthest, since = recording.sent_bytes, time.monotonic()
                if not _is_away(error) or time.monotonic() - since > OUTAGE_SECONDS:
                    raise
            self._stopping.wait(LOOK_SECONDS)

    def count_sent(self, recording: Recording, count: int) -> None:
        """Raises Stopped where the upload shall end."""
        with recording.lock:
            recording.sent_bytes += count
            sent = recording.sent_bytes
        self._keep_on()
        self._bars.upload(recording.name, sent, recording.size_bytes or 0)

    def show_if_complete(self, entry: Entry) -> bool:
        """Whether the result is here already: its manifest, and every file that this names."""
        folder = self.place(entry.name)
        manifest = _read_manifest(folder)
        if entry.job_id is None or manifest.get("job_id") != entry.job_id:
            return False
        try:
            if any((folder / file["name"]).stat().st_size != file["size"] for file in manifest["files"]):
                return False
        except (OSError, KeyError, TypeError):
            return False
        self.rows.append(
            Row(name=entry.name, state="succeeded", frames=entry.frames, seconds=entry.seconds, says=str(folder))
        )
        return True

    def place(self, name: str) -> Path:
        """The folder of a recording's result. Raises Failure for a name that would lead out of the out folder."""
        parts = name.split("/")
        if {"", ".", ".."} & set(parts) or parts[0] == FOLDER or "\0" in name:
            raise Failure("its name cannot be that of a folder below the out folder")
        return self._out.joinpath(*parts)

    def _sum_up(self) -> None:
        """Without those that failed, whose frames are none to wait for."""
        counted = [
            each
            for each in self.recordings.values()
            if each.name in self.open or (each.job is not None and each.job["state"] == "succeeded")
        ]
        ended = sum(row.state != NOT_A_RECORDING for row in self.rows)
        self._bars.sum_up(counted, ended=ended, count=ended + len(self.open))

    # --- in threads of their own ------------------------------------------------------------------------------------

    def _start(self, pool: ThreadPoolExecutor, recording: Recording, act: Callable[[Recording], Json | Row]) -> None:
        started = pool.submit(self._do, recording, act)
        self._under_way.add(started)
        started.add_done_callback(self._under_way.discard)

    def _do(self, recording: Recording, act: Callable[[Recording], Json | Row]) -> None:
        outcome: Json | Row | BaseException
        try:
            self._keep_on()
            outcome = act(recording)
        except Stopped:
            return
        except (Failure, OSError) as error:
            outcome = error if _ends_all(error) else Row(name=recording.name, state="failed", says=tell(error))
        except BaseException as error:  # a bug; it must not leave the others waiting
            outcome = error
        self._inbox.put((recording, outcome))

    def _fetch(self, recording: Recording) -> Row:
        job, folder = recording.job or {}, self.place(recording.name)
        self._bars.fetch(recording.name)
        downloads.sweep(folder)
        _clear_other(folder, job["id"])
        self.persist(recording, lambda: self._client.download(job["id"], folder, on_bytes=lambda _: self._keep_on()))
        frames, seconds = job["timing"]["frames"], job["timing"]["total_seconds"]
        entry = self._journal.read(recording.name)
        if entry is not None:
            self._journal.write(replace(entry, frames=frames, seconds=seconds))
        return Row(name=recording.name, state="succeeded", frames=frames, seconds=seconds, says=str(folder))

    def _keep_on(self) -> None:
        if self._stopping.is_set():
            raise Stopped


def is_other(job: Json) -> bool:
    """Whether it failed because its file is none of a recording, where one was expected."""
    return bool(job["error"] is not None and job["error"]["code"] == "kind_mismatch")


def tell(error: Failure | OSError) -> str:
    """Its code, where it has one, and its detail."""
    if isinstance(error, OSError):
        return f"{os.fspath(error.filename) if error.filename else 'file'}: {error.strerror or error}"
    return f"{error.code}: {error.detail}" if isinstance(error, ApiError) else str(error)


def _is_away(error: Failure | OSError) -> bool:
    """Whether it may go better soon."""
    return isinstance(error, ServiceUnreachable | NotDownloaded) or (
        isinstance(error, ApiError) and error.status in BUSY
    )


def _ends_all(error: Failure | OSError) -> bool:
    """Whether no other recording would fare better."""
    if isinstance(error, ApiError):
        return error.status in BUSY or error.code == "unauthorized"
    return isinstance(error, ServiceUnreachable)


def _read_manifest(folder: Path) -> Mapping[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _clear_other(folder: Path, job_id: str) -> None:
    """Remove the result of an earlier job, its manifest first: where that is, all is there."""
    manifest = _read_manifest(folder)
    if manifest.get("job_id") in (None, job_id):
        return
    (folder / "manifest.json").unlink()
    for name in [str(file["name"]) for file in manifest.get("files", [])]:
        if Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
