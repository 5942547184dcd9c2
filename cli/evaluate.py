"""`maskline evaluate`: a mode's masks, or masks of any origin, against the truth of a benchmark."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from cli import options
from cli.failures import FAILED, INTERRUPTED, Failure, Misuse
from shared.inference.recipe import DEFAULT, Recipe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cli.pairs import Pair, Pairs
    from shared.inference.metrics import Protocol, Scores

    Make: TypeAlias = Callable[[Path], tuple[NDArray[np.uint8], dict[str, Any] | None]]

app = typer.Typer(rich_markup_mode=None)

NAMED = 10
"""So many of the files without a partner are named on the terminal; JSON has them all."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    scores: "Scores"
    model: dict[str, Any] | None
    """What made the masks, where a model did."""
    failed: list[dict[str, str]]
    """The files that could not be compared, and why."""


@app.command(
    epilog="Example: maskline evaluate --images images/validation --labels annotations/validation "
    "--label-space ade20k --mode sota"
)
def evaluate(
    labels: Annotated[
        Path, typer.Option(metavar="DIR", exists=True, file_okay=False, help="The truth: 8-bit gray or palette PNGs.")
    ],
    label_space: Annotated[str, typer.Option(help="What their ids mean: ade20k, voc or demo.")],
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", exists=True, file_okay=False, help="Not needed with --masks.")
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", "-m", help="Whose masks are scored.")] = None,
    masks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", exists=True, file_okay=False, help="Score these masks; no model is run."),
    ] = None,
    input_size: options.InputSize = None,
    resize: options.Resize = DEFAULT.resize,
    tta: options.Tta = False,
    tiles: options.Tiles = False,
    tile_overlap: options.TileOverlap = DEFAULT.tile_overlap,
    unlabeled_below: options.UnlabeledBelow = DEFAULT.unlabeled_below,
    only: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Names to compare, one a line: VOC's val.txt."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="The first N pairs, by name.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Score masks against a benchmark's truth.

    Files belong together when their names agree but for the ending. What the benchmark ignores is ignored: 0 in ADE20K,
    255 in VOC. Masks are compared at the truth's own size.
    """
    from cli.engine import choose_mode, choose_recipe, require_core
    from cli.images import SUFFIXES
    from cli.pairs import pair, read_names

    require_core()
    protocol = _choose_protocol(label_space)
    recipe = choose_recipe(
        input_size=input_size, resize=resize, tta=tta, tiles=tiles, tile_overlap=tile_overlap,
        unlabeled_below=unlabeled_below,
    )  # fmt: skip
    if mode and resize == "fit":
        recipe = replace(recipe, input_size=input_size or choose_mode(mode).input_size)  # so that the score says it
    make = _choose_maker(protocol, recipe, images=images, mode=mode, masks=masks)
    pairs = pair(
        masks or images or Path(),
        labels,
        source_suffixes=(".png",) if masks else SUFFIXES,
        only=read_names(only) if only else None,
    )
    _name_missing("label", pairs.without_label)
    _name_missing("mask" if masks else "image", pairs.without_source)
    try:
        outcome = score(pairs.found[:limit], protocol, make=make)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        made = {"mode": mode, "recipe": asdict(recipe) if mode else None}
        print(json.dumps({"label_space": label_space, **made, **_describe(outcome, pairs)}, indent=1))
    else:
        _print_scores(outcome.scores, origin=_name_origin(mode, recipe, outcome.model, masks))
        if mode:
            _print_published(mode)
    if outcome.failed:
        raise typer.Exit(FAILED)


def score(pairs: "Sequence[Pair]", protocol: "Protocol", *, make: "Make") -> Outcome:
    """Compare all of them; what cannot be compared is named on standard error and does not keep the others back.

    Raises Failure when the model cannot be had or nothing could be compared.
    """
    from cli.progress import track
    from shared.inference.errors import InferenceError, ModelUnavailable
    from shared.inference.labelmaps import read_label_map
    from shared.inference.metrics import Tally

    tally, failed = Tally(protocol), list[dict[str, str]]()
    model: dict[str, Any] | None = None
    for each in track(pairs, name=lambda each: each.name):
        file = each.label  # whose fault it would be
        try:
            truth = read_label_map(file)
            file = each.source
            mask, model = make(file)
            file = each.label
            tally.add(truth=truth, mask=mask)
        except ModelUnavailable as error:
            raise Failure(str(error)) from error
        except (InferenceError, OSError) as error:
            detail = str(error) if isinstance(error, InferenceError) else error.strerror or str(error)
            failed.append({"file": str(file), "detail": detail})
            print(f"maskline: {file}: {detail}", file=sys.stderr)
    try:
        return Outcome(scores=tally.score(), model=model, failed=failed)
    except InferenceError as error:
        raise Failure(f"nothing could be compared: {error}") from error


def _choose_protocol(name: str) -> "Protocol":
    from shared.inference.metrics import PROTOCOLS

    if name not in PROTOCOLS:
        raise Misuse(f"there is no label space {name}; the label spaces are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def _choose_maker(
    protocol: "Protocol", recipe: Recipe, *, images: Path | None, mode: str | None, masks: Path | None
) -> "Make":
    """What gives the mask of a source, and the model that made it where that is known."""
    from cli.engine import choose_mode, load_pixel_limit, open_engine

    if masks:
        if mode or recipe != DEFAULT:
            raise Misuse("--masks are scored as they are: leave --mode and what makes masks out")
        from shared.inference.labelmaps import read_label_map

        return lambda path: (read_label_map(path), None)
    if not images or not mode:
        raise Misuse("say what to score: --images with --mode, or --masks")
    chosen = choose_mode(mode)
    if chosen.label_space != protocol.label_space.name:
        raise Misuse(
            f"mode {mode} gives {chosen.label_space} ids, which cannot be compared with {protocol.label_space.name}"
        )
    from shared.inference import media

    limit, engine = load_pixel_limit(), open_engine()

    def make(path: Path) -> "tuple[NDArray[np.uint8], dict[str, Any]]":
        made = engine.segment(media.read_image(path, max_pixels=limit), mode, recipe)
        model = asdict(made.model)
        # These follow each image's aspect; of a whole set only the recipe can be told.
        del model["input_size"], model["passes"]
        return made.mask, model

    return make


def _name_missing(what: str, names: Sequence[str]) -> None:
    if names:
        rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        print(f"maskline: no {what} for {', '.join(names[:NAMED])}{rest}", file=sys.stderr)


def _describe(outcome: Outcome, pairs: "Pairs") -> dict[str, Any]:
    return {
        "model": outcome.model,
        **asdict(outcome.scores),
        "without_label": pairs.without_label,
        "without_source": pairs.without_source,
        "failed": outcome.failed,
    }


def _name_origin(mode: str | None, recipe: Recipe, model: dict[str, Any] | None, masks: Path | None) -> str:
    if model is None:
        return f"masks in {masks}"
    wanted = [f"{name} {value}" for name, value in asdict(recipe).items() if value != getattr(DEFAULT, name)]
    return ", ".join([f"mode {mode}", f"{model['name']} ({model['revision']})", model["dtype"], *wanted])


def _print_scores(scores: "Scores", *, origin: str) -> None:
    from rich.table import Table

    from cli.tables import make_console

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", justify="right")
    table.add_column("class")
    for name in ("IoU", "accuracy", "boundary F", "of the truth"):
        table.add_column(name, justify="right")
    shown = [each for each in scores.classes if each.iou is not None]
    for each in shown:
        figures = (each.iou, each.accuracy, each.boundary_f, each.pixels / scores.pixels)
        table.add_row(str(each.id), each.name, *map(_percent, figures))
    console = make_console()
    console.print(table)
    if len(shown) < len(scores.classes):
        print(f"{len(scores.classes) - len(shown)} classes occur in neither truth nor masks, and count in no mean")
    print(f"\n{scores.images} images, {scores.pixels} labeled pixels; {origin}")
    for name, value in _name_means(scores):
        print(f"{name:<15} {_percent(value):>6} %")


def _print_published(mode: str) -> None:
    """What somebody else measured, on what and how: a score is only as comparable as these are alike."""
    from cli.engine import choose_mode

    quality = choose_mode(mode).quality
    if quality.miou:
        print(f"published: mIoU {quality.miou} % on {quality.benchmark} ({quality.note})")


def _name_means(scores: "Scores") -> Iterator[tuple[str, float | None]]:
    yield "mIoU", scores.miou
    yield "mean accuracy", scores.mean_accuracy
    yield "pixel accuracy", scores.pixel_accuracy
    yield "boundary F", scores.boundary_f


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.2f}"
