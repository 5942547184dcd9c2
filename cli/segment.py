"""`maskline segment`: masks of local images, made in this process, without a service."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.failures import FAILED, INTERRUPTED, Failure, Misuse
from shared.inference.recipe import DEFAULT, Recipe

if TYPE_CHECKING:
    from shared.inference.modes import Mode

app = typer.Typer(rich_markup_mode=None)

ENDINGS = (".png", ".overlay.png", ".confidence.png")


@dataclass(frozen=True, kw_only=True)
class Task:
    image: Path
    mask: Path
    overlay: Path | None
    confidence: Path | None


@app.command(epilog="Example: maskline segment photo.jpg holiday/ --mode demo --out masks")
def segment(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", exists=True, readable=True, help="Images, and folders that hold images."),
    ],
    mode: options.Mode,
    out: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where NAME.png goes.")] = Path("masks"),
    overlay: Annotated[bool, typer.Option("--overlay", help="Also NAME.overlay.png, the classes over the image.")] = (
        False
    ),
    confidence: Annotated[
        bool, typer.Option("--confidence", help="Also NAME.confidence.png, how sure each pixel is: 255 is certain.")
    ] = False,
    input_size: options.InputSize = None,
    resize: options.Resize = DEFAULT.resize,
    tta: options.Tta = False,
    tiles: options.Tiles = False,
    tile_overlap: options.TileOverlap = DEFAULT.tile_overlap,
    unlabeled_below: options.UnlabeledBelow = DEFAULT.unlabeled_below,
    force: Annotated[bool, typer.Option("--force", help="Replace masks that are there already.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Make masks of images here, without a service.

    Prints each mask's path once it is written (as JSON: one object per image). An image that fails does not keep the
    others back.
    """
    from cli.engine import choose_mode, choose_recipe, require_core
    from cli.images import expand

    require_core()
    chosen = choose_mode(mode)
    recipe = choose_recipe(
        input_size=input_size, resize=resize, tta=tta, tiles=tiles, tile_overlap=tile_overlap,
        confidence=confidence, unlabeled_below=unlabeled_below,
    )  # fmt: skip
    tasks = plan(expand(files), out=out, overlay=overlay, confidence=confidence, force=force)
    failed = False
    try:
        for task, made in _make_all(tasks, chosen, recipe):
            for said in [made["error"]["detail"]] if "error" in made else made["warnings"]:
                print(f"maskline: {task.image}: {said}", file=sys.stderr)
            failed = failed or "error" in made
            if as_json:
                print(json.dumps(made), flush=True)
            elif "error" not in made:
                print(task.mask, flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if failed:
        raise typer.Exit(FAILED)


def plan(images: Sequence[Path], *, out: Path, overlay: bool, confidence: bool, force: bool) -> list[Task]:
    """What goes where: images of one name from different folders become NAME, NAME-2 and so on.

    Raises Failure for masks that are there already unless `force`, and Misuse where a mask would replace an image.
    """
    tasks, taken = [], set[Path]()
    for image in images:
        name, number = image.stem, 1
        while taken & (places := {out / f"{name}{ending}" for ending in ENDINGS}):
            number += 1
            name = f"{image.stem}-{number}"
        taken |= places
        mask, tinted, sure = (out / f"{name}{ending}" for ending in ENDINGS)
        tasks.append(
            Task(image=image, mask=mask, overlay=tinted if overlay else None, confidence=sure if confidence else None)
        )
    targets = [path for task in tasks for path in (task.mask, task.overlay, task.confidence) if path]
    sources = {image.resolve() for image in images}
    for target in targets:
        if target.resolve() in sources:
            raise Misuse(f"{target} is one of the images itself: choose another --out")
    there = [target for target in targets if target.exists()]
    if there and not force:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise Failure(f"{there[0]}{others} would be replaced: say --force, or choose another --out")
    return tasks


def _make_all(tasks: Sequence[Task], mode: "Mode", recipe: Recipe) -> Iterator[tuple[Task, dict[str, Any]]]:
    """What became of each, once it is known. Raises Failure when the model cannot be had: no image would go better."""
    from cli.engine import load_pixel_limit, open_engine
    from cli.progress import track
    from shared.inference import media
    from shared.inference.errors import InferenceError, ModelUnavailable

    limit, engine = load_pixel_limit(), open_engine()
    for task in track(tasks, name=lambda task: task.image.name):
        try:
            image = media.read_image(task.image, max_pixels=limit)
            made = engine.segment(image, mode.name, recipe)
        except ModelUnavailable as error:
            raise Failure(str(error)) from error
        except InferenceError as error:
            yield task, _tell_error(task, error.code, str(error))
        except OSError as error:
            yield task, _tell_error(task, "unreadable", error.strerror or str(error))
        else:
            _write(task, image, made, mode)
            yield task, _tell(task, made, mode)


def _write(task: Task, image: Any, made: Any, mode: "Mode") -> None:
    from cli.downloads import write
    from shared.inference import masks

    try:
        if task.overlay:
            write(task.overlay, masks.encode_png(masks.overlay(image, made.mask, mode.labels)))
        if task.confidence:
            write(task.confidence, masks.encode_mask(made.confidence))
        write(task.mask, masks.encode_mask(made.mask))
    except OSError as error:
        raise Failure(f"{task.mask} cannot be written: {error.strerror}") from error


def _tell(task: Task, made: Any, mode: "Mode") -> dict[str, Any]:
    from shared.inference import masks

    height, width = made.mask.shape
    stages = ("load", "preprocess", "inference", "postprocess")
    return {
        "file": str(task.image),
        "mask": str(task.mask),
        "overlay": str(task.overlay) if task.overlay else None,
        "confidence": str(task.confidence) if task.confidence else None,
        "width": width,
        "height": height,
        "classes": {mode.labels.classes[number]: pixels for number, pixels in masks.class_areas(made.mask).items()},
        "seconds": {name: round(getattr(made, f"{name}_seconds"), 4) for name in stages},
        "model": asdict(made.model),
        "warnings": list(made.warnings),
    }


def _tell_error(task: Task, code: str, detail: str) -> dict[str, Any]:
    return {"file": str(task.image), "error": {"code": code, "detail": detail}}
