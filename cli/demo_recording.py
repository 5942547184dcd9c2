"""The demo's recording: a drawn place that moves, sent as a video, and what came back of it."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from cli import downloads
from cli.client import Client
from cli.plot import draw_areas
from shared.inference.demo.scenes import draw_scene
from shared.inference.labels import DEMO
from shared.inference.mask_video import read_masks
from shared.inference.metrics import PROTOCOLS, Tally
from shared.inference.overlay_video import OverlayVideoWriter

PLACE = 1_000_011
SIZE = (320, 240)
FRAMES = 24
FRAME_SECONDS = Fraction(1, 8)
JOB_SECONDS = 240.0
FILES = {
    "input.mp4": "what was sent",
    "overlay.mp4": "the classes over it; plays in a browser",
    "areas.png": "how much of each frame every class covers",
    "masks.mkv": "the masks, one per frame, lossless",
}


def run_recording(client: Client, out: Path, *, show: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
    """Send it, wait, fetch the result into `out`, and say how it went: state, frames, and mIoU with the truth."""
    for path in out.glob("*"):
        path.unlink()  # of an earlier run: nothing of it may be taken for this one's
    sent = draw_recording(out / "input.mp4")
    job = client.submit_file(sent, mode="demo", options={"outputs": ["mask", "overlay"]})
    job = client.wait(job["id"], on_event=show, timeout_seconds=JOB_SECONDS)
    told = {"job_id": job["id"], "state": job["state"], "error": job["error"], "frames": 0, "miou": None}
    if job["state"] != "succeeded":
        return told
    client.download(job["id"], out)
    lines = [json.loads(line) for line in (out / "areas.jsonl").read_text().splitlines()]
    areas = [{each["id"]: each["fraction"] for each in line["classes"].values()} for line in lines]
    downloads.write(out / "areas.png", draw_areas([line["seconds"] for line in lines], areas, DEMO))
    tally = Tally(PROTOCOLS["demo"])
    for number, (_, mask) in enumerate(read_masks(out / "masks.mkv")):
        tally.add(truth=_draw(number).labels, mask=mask)
    return told | {"frames": len(lines), "miou": round(tally.score().miou or 0.0, 4)}


def draw_recording(path: Path) -> Path:
    """Write the place as a video of FRAMES frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with OverlayVideoWriter(path, SIZE, FRAME_SECONDS) as video:
        for number in range(FRAMES):
            video.write(np.ascontiguousarray(_draw(number).image), number)
    return path


def _draw(number: int) -> Any:
    return draw_scene(PLACE, width=SIZE[0], height=SIZE[1], time_seconds=float(number * FRAME_SECONDS))
