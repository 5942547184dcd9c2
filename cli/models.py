"""`maskline models`: which modes there are, whether their weights are on this machine, and getting them here."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.failures import Failure, Misuse

if TYPE_CHECKING:
    from shared.config import Models
    from shared.inference.modes import Mode

app = typer.Typer(rich_markup_mode=None, help="The modes and their weights.")

WORKER_NEEDED = (
    "weights are read by the worker's packages, which are not installed here: pip install 'maskline[worker]'"
)


@app.command("list", epilog="Example: maskline models list")
def list_models(as_json: options.AsJson = False) -> None:
    """List the modes and where their weights are."""
    rows = [describe(mode) for mode in _choose(())]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.table import Table
    from rich.text import Text

    from cli.tables import make_console

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("mode", "model", "licence", "weights"):
        table.add_column(name, overflow="fold")
    for row in rows:
        here = Text(row["path"] or f"{row['source']}\n{row['advice']}", style="" if row["path"] else "yellow")
        table.add_row(row["mode"], row["model"], row["licence"], here)
    make_console().print(table)


@app.command(epilog="Example: maskline models pull fast balanced")
def pull(
    modes: Annotated[list[str] | None, typer.Argument(metavar="[MODE]...", help="All when left out.")] = None,
) -> None:
    """Download the weights of modes.

    What is complete is not fetched again.
    """
    weights = _import_weights()
    from shared.inference.errors import ModelUnavailable

    settings = _load_model_settings()
    failed = []
    for mode in _choose(modes or ()):
        source, revision = _find_source(settings, mode)
        try:
            found = weights.pull(mode, source=source, revision=revision, cache_folder=settings.cache_folder)
        except ModelUnavailable as error:
            failed.append(str(error))
        else:
            print(f"{mode.name:<9} {found.path}  ({found.revision})")
    if failed:
        raise Failure("\n".join(failed))


def describe(mode: "Mode") -> dict[str, Any]:
    """A mode and the state of its weights here. Downloads nothing."""
    weights = _import_weights()
    from shared.inference.errors import ModelUnavailable

    settings = _load_model_settings()
    source, revision = _find_source(settings, mode)
    path: str | None = None
    try:
        found = weights.find(mode, source=source, revision=revision, cache_folder=settings.cache_folder, offline=True)
        path = str(found.path)
    except ModelUnavailable:
        pass  # that is the answer
    return {
        "mode": mode.name,
        "model": mode.title,
        "label_space": mode.label_space,
        "licence": mode.licence,
        "commercial_use": mode.commercial_use,
        "source": source or mode.source,
        "path": path,
        "advice": None if path else f"run: maskline models pull {mode.name}",
    }


def _choose(names: Sequence[str]) -> list["Mode"]:
    from shared.inference.modes import MODES

    for name in names:
        if name not in MODES:
            raise Misuse(f"there is no mode {name}; the modes are {', '.join(MODES)}")
    return [MODES[name] for name in dict.fromkeys(names)] or list(MODES.values())


def _find_source(settings: "Models", mode: "Mode") -> tuple[str | None, str | None]:
    given = settings.sources().get(mode.name)
    return (given.source, given.revision) if given else (None, None)


def _load_model_settings() -> "Models":
    from cli.access import load_service_settings

    return load_service_settings().models


def _import_weights() -> Any:
    try:
        from shared.inference import weights
    except ImportError as error:
        raise Failure(WORKER_NEEDED) from error
    return weights
