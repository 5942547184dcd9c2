"""`maskline archive`: every recording below a folder, or below a prefix of a bucket, and its result in a folder here.

The jobs come from `cli/origins.py`; what then happens to them is `cli/recordings.py`, and what a second run has to know
`cli/journal.py`.
"""

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.failures import FAILED, INTERRUPTED, Misuse

if TYPE_CHECKING:
    from cli.client import Client
    from cli.progress import Bars
    from cli.recordings import Row, Work

app = typer.Typer(rich_markup_mode=None)

CONTINUES = "what was submitted goes on in the service, and the same command continues from here"


@app.command(epilog="Example: maskline archive recordings --mode accurate --overlay --out masks")
def archive(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER|s3://BUCKET/PREFIX", help="Searched with all folders in it.")
    ],
    mode: options.Mode,
    out: Annotated[
        Path, typer.Option(metavar="DIR", file_okay=False, help="Results go to DIR/<the recording's path>/.")
    ],
    input_size: options.InputSize = None,
    overlay: options.Overlay = False,
    option: options.JobOption = None,
    parallel: Annotated[
        int, typer.Option(metavar="N", min=1, max=16, help="So many uploads, and downloads, at a time.")
    ] = 2,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Make masks of all recordings of a folder or bucket.

    It may be interrupted at any time: the same command continues, and repeats nothing that is done. A recording that
    failed is tried again by the next run, one that was changed is done anew. What is no recording is listed.

    Exit status: 0 if all succeeded, 1 if any failed, 2 if there is no recording at all.
    """
    wanted = options.read_job_options(option or (), input_size=input_size, overlay=overlay)
    _check_options(wanted)
    folder = None if source.startswith("s3://") else _check_folder(Path(source), out)
    place = _check_prefix(source) if folder is None else str(folder.resolve())
    with options.connect(url, api_key) as client:
        _check_mode(client, mode)
        from rich.console import Console

        from cli.journal import open_journal
        from cli.origins import Folder, Prefix
        from cli.progress import Bars
        from cli.recordings import Work

        with (
            open_journal(out, source=place, mode=mode, options=wanted) as journal,
            Bars(Console(stderr=True, highlight=False)) as bars,
        ):
            work = Work(client, journal, out, bars, parallel=parallel)
            with _stopping(work, bars):
                origin = Prefix(client, journal, work) if folder is None else Folder(folder, client, journal, work)
                origin.begin()
                work.run(origin.look)
    _report(source, work.rows)


@contextmanager
def _stopping(work: "Work", bars: "Bars") -> Iterator[None]:
    """However the block ends, what it has under way ends too."""
    from cli.client import ApiError, ServiceUnreachable

    try:
        yield
    except KeyboardInterrupt:
        bars.stop()
        stopped = work.stop()
        print(f"maskline: interrupted; {CONTINUES}", file=sys.stderr, flush=True)
        if not stopped:
            os._exit(INTERRUPTED)  # a line that hangs would be waited for, and nothing half done is in its place
        raise typer.Exit(INTERRUPTED) from None
    except (ServiceUnreachable, ApiError):
        if work.recordings:
            print(f"maskline: {CONTINUES}", file=sys.stderr)
        raise
    finally:
        work.stop()


def _report(source: str, rows: "list[Row]") -> None:
    from cli.recordings import NOT_A_RECORDING
    from cli.tables import print_archive

    if all(row.state == NOT_A_RECORDING for row in rows):
        others = f"; {len(rows)} of something else" if rows else ""
        raise Misuse(f"{source} holds no recording{others}")
    print_archive(sorted(rows, key=lambda row: (row.state == NOT_A_RECORDING, row.name)))
    if any(row.failed for row in rows):
        raise typer.Exit(FAILED)


def _check_options(wanted: Mapping[str, Any]) -> None:
    """Before the first byte is sent, since what is wrong with them is wrong for all."""
    from pydantic import ValidationError

    from shared.contract import Options

    try:
        Options.model_validate(wanted)
    except ValidationError as error:
        wrong = "; ".join(
            ": ".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")]) for each in error.errors()
        )
        raise Misuse(f"these options cannot be meant: {wrong}") from error


def _check_mode(client: "Client", mode: str) -> None:
    names = [each["name"] for each in client.modes()]
    if mode not in names:
        raise Misuse(f"there is no mode {mode}; the modes are {', '.join(names)}")


def _check_folder(folder: Path, out: Path) -> Path:
    if not folder.is_dir():
        raise Misuse(f"{folder} is no folder")
    if folder.resolve() == out.resolve():
        raise Misuse(f"{out} holds the recordings themselves: choose another --out")
    return folder


def _check_prefix(source: str) -> str:
    """With a slash at its end: `day1` is not meant to be `day10` as well."""
    if not re.fullmatch(r"s3://[^/\s]+(/.*)?", source):
        raise Misuse(f"{source} is no place in a bucket; one looks like s3://bucket/path/")
    return source.rstrip("/") + "/"
