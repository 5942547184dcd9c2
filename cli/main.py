"""The `maskline` command: its start and end, and the commands that run a service or look after it.

The other commands are in modules of their own noun. What is slow to import is imported where it is used, so that help
comes at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import archive, batches, database, evaluate, jobs, models, options, segment
from cli.failures import FAILED, MISUSED, Failure
from cli.local.child import StackError

app = typer.Typer(
    name="maskline",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels would double the time that help takes
    help="Maskline turns images into segmentation masks.",
    epilog=(
        "The service is found by --url and --api-key, else by MASKLINE_URL and MASKLINE_API_KEY, else it is the local "
        "stack whose .maskline folder is nearest, from here upwards.\n\n"
        "Exit status: 0 ok · 1 failed · 2 misused · 3 the service cannot be reached · 4 the service refused · "
        "130 interrupted.\n\n"
        "Example: maskline up, and in another terminal: maskline submit photo.jpg --mode demo --wait --out masks"
    ),
)

Data = Annotated[
    Path, typer.Option("--data", metavar="DIR", file_okay=False, help="The data folder of the local stack.")
]
DEFAULT_DATA = Path(".maskline")


def _print_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(f"maskline {importlib.metadata.version('maskline')}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(epilog="Example: maskline up --port 8000")
def up(
    data: Data = DEFAULT_DATA,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the API.", show_default="the last one, else a free one")
    ] = None,
    gpu_workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that compute, one job at a time each.")
    ] = 1,
) -> None:
    """Run the whole service on this machine.

    It needs neither root nor containers, keeps its data in the data folder, and drains on Ctrl-C.
    """
    from cli.local.up import run_stack

    raise typer.Exit(run_stack(data, port=port, gpu_workers=gpu_workers))


@app.command(epilog="Example: maskline demo --out demo-output")
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where the pictures go.")] = Path(
        "demo-output"
    ),
    data: Data = DEFAULT_DATA,
) -> None:
    """Start everything and segment a drawn scene.

    The scene goes through the REST interface; its result, its webhook and its mask are checked.
    """
    from cli.demo import run_demo

    raise typer.Exit(run_demo(out, data=data))


@app.command(epilog="Example: maskline doctor")
def doctor(url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Say what is well, what is not, what to do.

    Looks at GPU, driver, torch, weights, database, Redis, S3, disk and service. ✓ is well, ✗ is broken and makes the
    command fail, – is worth knowing.
    """
    from rich.console import Console
    from rich.text import Text

    from cli.access import load_service_settings
    from cli.doctor import examine

    console = Console(highlight=False)
    styles = {"✓": "green", "✗": "bold red", "–": "yellow"}
    broken = False
    for finding in examine(load_service_settings(), url=url, api_key=api_key):
        broken = broken or finding.mark == "✗"
        console.print(
            Text.assemble((finding.mark, styles[finding.mark]), f" {finding.subject:<17} {finding.says}"),
            soft_wrap=True,
        )
    raise typer.Exit(FAILED if broken else 0)


app.add_typer(jobs.app)
app.add_typer(archive.app)
app.add_typer(batches.app)
app.add_typer(segment.app)
app.add_typer(evaluate.app)
app.add_typer(database.app)
app.add_typer(database.keys, name="keys")
app.add_typer(database.tenants, name="tenants")
app.add_typer(models.app, name="models")


def run() -> None:
    """The entry point. What a user can put right is one line each; anything else is a bug and keeps its traceback."""
    try:
        status = app(standalone_mode=False)
    except typer.TyperException as error:
        status = _refuse(f"{error.format_message()} (maskline --help)", MISUSED)
    except Failure as error:
        status = _refuse(str(error), error.exit_status)
    except StackError as error:
        status = _refuse(str(error), FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        status = _refuse(f"{error.filename}: {error.strerror}", FAILED)
    sys.exit(status or 0)


def _refuse(message: str, status: int) -> int:
    print(f"maskline: {' '.join(message.split()) if status == MISUSED else message}", file=sys.stderr)
    return status
