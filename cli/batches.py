"""The commands about batches: batches, batch."""

import json
import uuid
from typing import Annotated

import typer

from cli import options

app = typer.Typer(rich_markup_mode=None)


@app.command("batches", epilog="Example: maskline batches --limit 5")
def list_batches(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many, the newest first.")] = 20,
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """List the newest batches."""
    with options.connect(url, api_key) as client:
        batches = client.list_batches(limit=limit)
    if as_json:
        for batch in batches:
            print(json.dumps(batch))
        return
    from cli.tables import print_batches

    print_batches(batches)


@app.command("batch", epilog="Example: maskline batch 019a0b52-7c1e-7d0a-9c55-3f1f0a0f4b12")
def show_batch(
    batch_id: Annotated[uuid.UUID, typer.Argument(metavar="BATCH")],
    as_json: options.AsJson = False,
    url: options.Url = None,
    api_key: options.ApiKey = None,
) -> None:
    """Show one batch.

    What became of its jobs, how fast they go and how long the rest will take.
    """
    with options.connect(url, api_key) as client:
        batch = client.get_batch(str(batch_id))
    if as_json:
        print(json.dumps(batch, indent=1))
        return
    from cli.tables import print_batch

    print_batch(batch)
