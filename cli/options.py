"""The options that several commands share."""

from typing import TYPE_CHECKING, Annotated

import typer

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
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def connect(url: str | None, api_key: str | None) -> "Client":
    """A client of the service that is meant; no request is made yet."""
    from cli.access import find_access
    from cli.client import Client

    access = find_access(url=url, api_key=api_key)
    return Client(access.url, access.api_key)
