"""The commands about jobs: submit, jobs, status, result, cancel. Results go to standard output, the rest to the other.

Everything here goes through the REST interface, as any other client would.
"""

import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.failures import FAILED, INTERRUPTED, REFUSED

if TYPE_CHECKING:
    from cli.client import Client

app = typer.Typer(rich_markup_mode=None)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    file: Path
    job: dict[str, Any]


@app.command(epilog="Example: maskline submit photo.jpg --mode balanced --wait --out masks")
def submit(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE", exists=True, dir_okay=False, readable=True, help="Images.")
    ],
    mode: options.Mode,
    input_size: Annotated[
        int | None, typer.Option(metavar="N", help="The model is given about N×N pixels.", show_default="the mode's")
    ] = None,
    overlay: options.Overlay = False,
    option: options.JobOption = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Until the jobs have ended.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", file_okay=False, help="Wait, then put results in DIR/<file's name>/.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.0, help="How long to wait for each job.")] = 3600,
    webhook_url: Annotated[str | None, typer.Option(metavar="URL", help="Is called when a job has ended.")] = None,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Submit images.

    Prints one line per job. A file that is refused does not keep the others back.
    """
    wanted = options.read_job_options(option or (), input_size=input_size, overlay=overlay)
    with options.connect(url, api_key) as client:
        submitted = _submit_all(client, files, mode=mode, wanted=wanted, webhook_url=webhook_url)
        if wait or out:
            submitted = _wait_all(client, submitted, timeout_seconds=timeout)
        for each in submitted:
            print(json.dumps(each.job) if as_json else _tell(each))
        if out:
            _fetch_all(client, submitted, out)
    if len(submitted) < len(files):
        raise typer.Exit(REFUSED)
    if any(each.job["state"] not in ("queued", "running", "succeeded") for each in submitted):
        raise typer.Exit(FAILED)


@app.command("jobs", epilog="Example: maskline jobs --state failed --limit 20")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed, canceled or expired.")] = None,
    mode: Annotated[str | None, typer.Option("--mode", "-m", help="Of this mode alone.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many, the newest first.")] = 20,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """List the newest jobs."""
    with options.connect(url, api_key) as client:
        jobs = client.list_jobs(state=state, mode=mode, limit=limit)
    if as_json:
        for job in jobs:
            print(json.dumps(job))
        return
    from cli.tables import print_jobs

    print_jobs(jobs)


@app.command(epilog="Example: maskline status 019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b11")
def status(
    job_id: Annotated[uuid.UUID, typer.Argument(metavar="JOB")],
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show one job.

    Where it is, what it took, why it failed.
    """
    with options.connect(url, api_key) as client:
        job = client.get(str(job_id))
    if as_json:
        print(json.dumps(job, indent=1))
        return
    from cli.tables import print_job

    print_job(job)


@app.command(epilog="Example: maskline result 019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b11 --out masks")
def result(
    job_id: Annotated[uuid.UUID, typer.Argument(metavar="JOB")],
    out: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where its files go.")],
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Download what a job made.

    Each file is checked against its digest before it takes its place.
    """
    with options.connect(url, api_key) as client:
        for path in client.download(str(job_id), out):
            print(path)


@app.command(epilog="Example: maskline cancel 019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b11")
def cancel(
    job_id: Annotated[uuid.UUID, typer.Argument(metavar="JOB")],
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Cancel a job.

    One that is queued ends at once, one that runs within seconds.
    """
    with options.connect(url, api_key) as client:
        job = client.cancel(str(job_id))
    print(f"{job['id']}  {'canceled' if job['state'] == 'canceled' else 'is being canceled'}")


def _submit_all(
    client: "Client", files: Sequence[Path], *, mode: str, wanted: dict[str, Any], webhook_url: str | None
) -> list[Submitted]:
    """One file that is refused does not keep the others back; without a service, none can go on."""
    from cli.client import ApiError

    submitted = []
    for file in files:
        try:
            job = client.submit_file(file, mode=mode, options=wanted, webhook_url=webhook_url)
        except ApiError as error:
            print(f"maskline: {file}: {error}", file=sys.stderr)
        else:
            submitted.append(Submitted(file=file, job=job))
    return submitted


def _wait_all(client: "Client", submitted: Sequence[Submitted], *, timeout_seconds: float) -> list[Submitted]:
    from cli.tables import show_progress

    finished: list[Submitted] = []
    try:
        with show_progress() as tell:
            for each in submitted:
                tell(each.file.name, each.job["state"])

                def note(kind: str, data: dict[str, Any], name: str = each.file.name) -> None:
                    tell(name, str(data.get("state") or data.get("stage") or kind))

                job = client.wait(each.job["id"], on_event=note, timeout_seconds=timeout_seconds)
                finished.append(Submitted(file=each.file, job=job))
    except KeyboardInterrupt:
        for each in submitted[len(finished) :]:
            print(f"maskline: the job goes on: maskline status {each.job['id']}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    return finished


def _fetch_all(client: "Client", submitted: Sequence[Submitted], out: Path) -> None:
    taken: set[str] = set()
    for each in submitted:
        if each.job["state"] != "succeeded":
            continue
        name, number = each.file.stem, 1
        while name in taken:  # files of the same name from different folders
            number += 1
            name = f"{each.file.stem}-{number}"
        taken.add(name)
        for path in client.download(each.job["id"], out / name):
            print(path, file=sys.stderr)


def _tell(submitted: Submitted) -> str:
    job = submitted.job
    line = f"{job['id']}  {job['state']:<9}  {submitted.file}"
    return f"{line}  {job['error']['code']}: {job['error']['detail']}" if job["error"] else line
