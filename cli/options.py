"""The options that several commands share."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.failures import Misuse
from shared.inference import recipe

if TYPE_CHECKING:
    from cli.client import Client

Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="MASKLINE_URL", metavar="URL", help="Where the service is.", show_default="the local stack"
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="MASKLINE_API_KEY", metavar="KEY", help="Its API key.", show_default="the local stack's"
    ),
]
Mode = Annotated[
    str, typer.Option("--mode", "-m", help="fast, balanced, accurate, sota or demo: `maskline models list`.")
]
INPUT_SIZES = (32, 4096)
"""As the service takes them (shared.contract)."""
InputSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=INPUT_SIZES[0],
        max=INPUT_SIZES[1],
        help="The model is given about N×N pixels.",
        show_default="the mode's",
    ),
]
Resize = Annotated[
    recipe.Resize,
    typer.Option(help="published: as the model's published evaluation did, without --input-size."),
]
Tta = Annotated[
    bool, typer.Option("--tta", help="Average six sizes, each also mirrored: the published multi-scale protocol.")
]
Tiles = Annotated[
    bool, typer.Option("--tiles", help="Show the image at its own resolution, in overlapping tiles of N×N pixels.")
]
TileOverlap = Annotated[
    float,
    typer.Option(metavar="PART", min=0.0, max=recipe.MAX_OVERLAP, help="Of a tile's side, shared with its neighbour."),
]
UnlabeledBelow = Annotated[
    float, typer.Option(metavar="PART", min=0.0, max=1.0, help="Pixels whose confidence is less get id 0.")
]
Overlay = Annotated[bool, typer.Option("--overlay", help="Also a picture of the classes over the image.")]
JobOption = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="Any other option of a job; VALUE is JSON or text."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def connect(url: str | None, api_key: str | None) -> "Client":
    """A client of the service that is meant; no request is made yet."""
    from cli.access import find_access
    from cli.client import Client

    access = find_access(url=url, api_key=api_key)
    return Client(access.url, access.api_key)


def read_job_options(given: Sequence[str], *, input_size: int | None, overlay: bool) -> dict[str, Any]:
    """The options of a job as they are sent. Misuse for what is not NAME=VALUE."""
    wanted: dict[str, Any] = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not name or not separator:
            raise Misuse(f"--option {each} is not NAME=VALUE, as in input_size=768")
        try:
            wanted[name] = json.loads(value)
        except ValueError:
            wanted[name] = value
    if input_size is not None:
        wanted["input_size"] = input_size
    if overlay:
        wanted["outputs"] = ["mask", "overlay"]
    return wanted
