"""How far the work on many files is: bars on a terminal, and little or nothing in a pipe."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, TypeVar

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from cli.tables import describe_seconds, printable

if TYPE_CHECKING:
    from cli.recordings import Recording

Item = TypeVar("Item")

MOST_BARS = 12
PACE_SECONDS = 60.0
"""Over how long the frames of all recordings are counted for their speed."""


def track(items: Sequence[Item], *, name: Callable[[Item], str]) -> Iterator[Item]:
    """The items one by one; the bar stands on standard error and shows the name of the one in hand, on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    # What is printed meanwhile goes above the bar where both share a terminal, and stays where it is sent otherwise.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("", total=len(items))
        for item in items:
            progress.update(task, description=name(item))
            yield item
            progress.advance(task)


class Bars:
    """How far an archive is, on standard error: on a terminal a bar for each of the recordings that something happens
    to, and one for all; elsewhere a line whenever one of them gets further. It may be told from many threads."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._shown: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}
        self._done: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._just_done = 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="ellipsis", no_wrap=True)),
            BarColumn(),
            TextColumn("{task.fields[says]}", markup=False),
            console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal,
        )  # fmt: skip
        self._all = self._progress.add_task("all", total=None, says="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; twice is the same as once."""
        self._progress.stop()

    def upload(self, name: str, sent_bytes: int, size_bytes: int) -> None:
        self._say(name, "uploading")
        says = f"uploading, {decimal(sent_bytes)} of {decimal(size_bytes)}"
        self._show(name, done=sent_bytes, total=size_bytes, says=says)

    def follow(self, name: str, job: dict[str, Any]) -> None:
        """A job that has not ended; one that is queued has a line, and no bar."""
        progress = job["progress"]
        self._say(name, f"job {job['id']} is {job['state']}")
        if job["state"] == "queued":
            self._hide(name)
            return
        says = f"{progress['done']} of {progress['total'] or 'so far unknown'} frames"
        self._show(name, done=progress["done"], total=progress["total"], says=says + _describe_pace(
            progress["frames_per_second"], progress["eta_seconds"]
        ))  # fmt: skip

    def fetch(self, name: str) -> None:
        self._say(name, "downloading its result")
        self._show(name, done=0, total=None, says="downloading its result")

    def end(self, name: str, state: str, says: str) -> None:
        self._hide(name)
        self._say(name, f"{state}, {says}" if says else state)

    def count_frames(self, count: int) -> None:
        """So many more were done just now; a step that is done anew may take some back."""
        self._just_done += max(count, 0)

    def sum_up(self, recordings: Sequence["Recording"], *, ended: int, count: int) -> None:
        """How far all of them are; `recordings` are those that this run works on, of `count` of which `ended` have.

        Lengths that are not known yet are guessed from the sizes of the files.
        """
        known = [each for each in recordings if each.frames is not None]
        done, total = sum(each.frames_done for each in known), sum(each.frames or 0 for each in known)
        known_bytes = sum(each.size_bytes or 0 for each in known)
        unknown_bytes = sum(each.size_bytes or 0 for each in recordings if each.frames is None)
        guessed = total + total * unknown_bytes // known_bytes if known_bytes else total
        self._done.append((time.monotonic(), self._just_done))
        self._just_done = 0
        while len(self._done) > 2 and self._done[0][0] < time.monotonic() - PACE_SECONDS:
            self._done.popleft()
        span = time.monotonic() - self._done[0][0]
        speed = sum(count for _, count in islice(self._done, 1, None)) / span if span > 0 else 0.0
        left = (guessed - done) / speed if speed else None
        says = f"{ended} of {count} recordings" + _describe_pace(speed or None, left)
        self._progress.update(self._all, completed=done, total=guessed or None, says=says)

    def _show(self, name: str, *, done: int, total: int | None, says: str) -> None:
        with self._lock:
            if name not in self._shown:
                if len(self._shown) == MOST_BARS:
                    return
                self._shown[name] = self._progress.add_task(printable(name), total=None, says="")
            self._progress.update(self._shown[name], completed=done, total=total, says=says)

    def _hide(self, name: str) -> None:
        with self._lock:
            if name in self._shown:
                self._progress.remove_task(self._shown.pop(name))

    def _say(self, name: str, says: str) -> None:
        with self._lock:
            if self._said.get(name) == says or self._console.is_terminal:
                return
            self._said[name] = says
            print(printable(f"{name}: {says}"), file=sys.stderr, flush=True)


def _describe_pace(frames_per_second: float | None, left_seconds: float | None) -> str:
    speed = f" · {frames_per_second:.3g} frames/s" if frames_per_second else ""
    return speed + (f" · about {describe_seconds(left_seconds)} left" if left_seconds is not None else "")
