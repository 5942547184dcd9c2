"""Jobs on a terminal: a table of many, a page of one, a line that moves while one is waited for."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cli.recordings import Row

Tell: TypeAlias = Callable[[str, str], None]

STYLES = {
    "succeeded": "green", "completed": "green", "failed": "red", "expired": "red", "canceled": "yellow",
    "running": "cyan",
}  # fmt: skip
PIPE_WIDTH = 240
UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def print_jobs(jobs: Sequence[dict[str, Any]]) -> None:
    if not jobs:
        print("no jobs", file=sys.stderr)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "state", "mode", "created", "took"):
        table.add_column(name, no_wrap=True)
    table.add_column("note", overflow="ellipsis", no_wrap=True)
    for job in jobs:
        table.add_row(
            job["id"],
            Text(job["state"], style=STYLES.get(job["state"], "")),
            job["mode"],
            describe_moment(job["created_at"]),
            describe_seconds(job["timing"]["total_seconds"]),
            Text(_note(job)),
        )
    make_console().print(table)


def print_job(job: dict[str, Any]) -> None:
    _print_page(_rows(job))


def print_batches(batches: Sequence[dict[str, Any]]) -> None:
    if not batches:
        print("no batches", file=sys.stderr)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("batch", "state", "mode", "created", "ended", "failed", "left"):
        table.add_column(name, no_wrap=True)
    table.add_column("name", overflow="ellipsis", no_wrap=True)
    for batch in batches:
        jobs = batch["jobs"]
        table.add_row(
            batch["id"],
            Text(batch["state"], style=STYLES.get(batch["state"], "")),
            batch["mode"],
            describe_moment(batch["created_at"]),
            f"{jobs['total'] - jobs['queued'] - jobs['running']} of {jobs['total']}",
            str(jobs["failed"] + jobs["expired"]),
            describe_seconds(batch["progress"]["eta_seconds"]),
            Text(batch["name"]),
        )
    make_console().print(table)


def print_batch(batch: dict[str, Any]) -> None:
    _print_page(_batch_rows(batch))


def print_archive(rows: Sequence["Row"]) -> None:
    """What became of every file, those that are no recordings last."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("recording", overflow="fold")
    for name in ("state", "frames", "took"):
        table.add_column(name, no_wrap=True, justify="right" if name == "frames" else "left")
    table.add_column("result", overflow="fold")
    for row in rows:
        table.add_row(
            Text(printable(row.name)),
            Text(row.state, style=STYLES.get(row.state, "dim")),
            "" if row.frames is None else str(row.frames),
            describe_seconds(row.seconds),
            Text(printable(row.says)),
        )
    make_console().print(table)


def printable(text: str) -> str:
    """On one line, and as far as it is text: the name of a file may be any bytes, and tell a terminal what to do."""
    decoded = os.fsencode(text).decode(errors="replace")
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in decoded)


def make_console() -> Console:
    """For standard output. In a pipe nobody sees a width, and half an id is of no use."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


@contextmanager
def show_progress() -> Iterator[Tell]:
    """A moving line on standard error, where that is a terminal; call what it gives with who and where."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda _who, _where: None
        return
    with console.status("") as line:
        yield lambda who, where: line.update(Text(f"{who}: {where}"))


def describe_seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in UNITS:
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s" if seconds < 1 else f"{seconds:.1f} s"


def describe_moment(moment: str | None) -> str:
    """RFC 3339 as a clock on this machine's wall."""
    return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def _print_page(rows: Iterator[tuple[str, str]]) -> None:
    page = Table.grid(padding=(0, 2))
    page.add_column(style="dim", no_wrap=True)
    page.add_column(overflow="fold")
    for name, value in rows:
        page.add_row(name, Text(value, style=STYLES.get(value, "")))
    make_console().print(page)


def _note(job: dict[str, Any]) -> str:
    if job["error"]:
        return f"{job['error']['code']}: {job['error']['detail']}"
    if job["cancel_requested_at"] and job["state"] == "running":
        return "is being canceled"
    return str(job["progress"]["stage"] or "") if job["state"] == "running" else ""


def _rows(job: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "job", job["id"]
    yield "state", job["state"]
    if job["error"]:
        yield "reason", f"{job['error']['code']}: {job['error']['detail']}"
    yield "mode", job["mode"]
    if job["queue_position"] is not None:
        yield "in the queue", f"{job['queue_position']}"
    for name in ("created", "started", "finished", "expires"):
        if job[f"{name}_at"]:
            yield name, describe_moment(job[f"{name}_at"])
    yield "attempts", str(job["attempts"])
    if job["progress"]["stage"] and job["state"] == "running":
        yield "progress", f"{job['progress']['stage']} ({job['progress']['done']} of {job['progress']['total']} frames)"
    stages = {name.removesuffix("_seconds"): value for name, value in job["timing"].items() if "_seconds" in name}
    spent = [f"{name} {describe_seconds(value)}" for name, value in stages.items() if value is not None]
    if spent:
        yield "took", " · ".join(spent)
    if job["model"]:
        model = job["model"]
        width, height = model["input_size"]
        yield "model", f"{model['name']} ({model['revision']}), {model['dtype']}, input {width}×{height}"
    if job["timing"]["device"]:
        yield "device", job["timing"]["device"]
    if job["metadata"]:
        yield "metadata", str(job["metadata"])


def _batch_rows(batch: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "batch", batch["id"]
    yield "name", batch["name"]
    yield "state", batch["state"]
    yield "mode", batch["mode"]
    for name in ("created", "finished"):
        if batch[f"{name}_at"]:
            yield name, describe_moment(batch[f"{name}_at"])
    counted = [f"{number} {state}" for state, number in batch["jobs"].items() if number and state != "total"]
    yield "jobs", " · ".join([f"{batch['jobs']['total']} in all", *counted])
    progress = batch["progress"]
    yield "frames", f"{progress['done']} of {progress['total'] if progress['total'] is not None else 'so far unknown'}"
    if progress["frames_per_second"] is not None:
        yield "speed", f"{progress['frames_per_second']:.3g} frames per second"
    if progress["eta_seconds"] is not None:
        yield "left", f"about {describe_seconds(progress['eta_seconds'])}"
    if batch["metadata"]:
        yield "metadata", str(batch["metadata"])
