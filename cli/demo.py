"""`maskline demo`: the whole road once, and a look at what came of it.

A drawn scene, whose true mask is known, goes through the public REST interface of a stack on this machine; the demo
checks the job, its signed webhook, its files and its mask, and leaves them in a folder with a summary.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text
from standardwebhooks import Webhook, WebhookVerificationError

from cli import downloads
from cli.access import Access, read_stack
from cli.client import Client, Json
from cli.demo_recording import FILES as RECORDING_FILES
from cli.demo_recording import run_recording
from cli.failures import FAILED
from cli.local.stack import Stack
from cli.picture import draw_comparison
from cli.receiver import Message, run_receiver
from shared.inference import masks
from shared.inference.demo.scenes import Scene, draw_scene
from shared.inference.labels import DEMO

MODE = "demo"
SCENE = 1_000_007
"""Training keeps to scenes below a million."""
LEAST_MIOU = 0.85
JOB_SECONDS = 240.0
FILES = {
    "picture.png": "the image beside its mask",
    "input.png": "what was sent",
    "mask.png": "what came back: one class id per pixel",
    "overlay.png": "the same in colours, over the input",
    "manifest.json": "what the result consists of, and what made it",
    "summary.json": "all of this in figures",
}
WEBHOOK_SECONDS = 30.0


def run_demo(out: Path, *, data: Path) -> int:
    """Returns the exit status. Raises StackError, ApiError and their like."""
    began = time.monotonic()
    console = Console(highlight=False)
    for name in FILES:
        (out / name).unlink(missing_ok=True)  # of an earlier run: nothing of it may be taken for this one's
    scene = draw_scene(SCENE)
    picture = downloads.write(out / "input.png", masks.encode_png(scene.image))
    with _find_service(data, console) as access, Client(access.url, access.api_key) as client:
        ready_after = time.monotonic() - began
        job, message = _run_job(client, picture, console)
        verified = _verify(message, secret=client.signing_secret(), job_id=job["id"])
        _note(console, "its webhook came, rightly signed" if verified else "no webhook told of it", good=verified)
        if job["state"] == "succeeded":
            client.download(job["id"], out)
        moving = _run_recording(client, out / "recording", console)
    summary = {
        **_describe(job),
        **_look_at_mask(out, scene),
        "webhook_verified": verified,
        "recording": moving,
        "stack_ready_seconds": round(ready_after, 2),
        "demo_seconds": round(time.monotonic() - began, 2),
    }
    downloads.write(out / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    problems = list(_find_problems(summary))
    _tell(console, summary, problems, out)
    return FAILED if problems else 0


def _describe(job: Json) -> Json:
    seconds = {name.removesuffix("_seconds"): value for name, value in job["timing"].items() if "_seconds" in name}
    return {
        "job_id": job["id"],
        "state": job["state"],
        "mode": job["mode"],
        "error": job["error"],
        "scene": SCENE,
        "seconds": {name: value for name, value in seconds.items() if value is not None},
        "device": job["timing"]["device"],
        "model": job["model"],
    }


def _look_at_mask(out: Path, scene: Scene) -> Json:
    """How well the mask agrees with the truth, if there is one; it is drawn beside its image."""
    if not (out / "mask.png").exists():
        return {"miou": None, "iou": {}}
    labels = masks.decode_mask((out / "mask.png").read_bytes())
    downloads.write(out / "picture.png", draw_comparison(scene.image, labels, DEMO))
    miou, ious = measure_miou(labels, scene.labels)
    return {"miou": miou, "iou": ious}


def measure_miou(labels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> tuple[float, dict[str, float]]:
    """The mean over the classes that either mask has, and each of them; background does not count."""
    ious: dict[str, float] = {}
    for class_id in range(1, len(DEMO.classes)):
        found, true = labels == class_id, truth == class_id
        union = int((found | true).sum())
        if union:
            ious[DEMO.classes[class_id]] = round(int((found & true).sum()) / union, 4)
    return round(sum(ious.values()) / len(ious), 4) if ious else 0.0, ious


@contextmanager
def _find_service(data: Path, console: Console) -> Iterator[Access]:
    """The stack that runs on this data folder already, else one of our own until the block ends."""
    running = read_stack(data)
    if running is not None:
        _note(console, f"the stack in {data} is running: {running.url}")
        yield Access(url=running.url, api_key=running.api_key)
        return
    began = time.monotonic()
    with console.status("Starting the stack …") as line:
        stack = Stack(data, report=lambda text: line.update(Text(text)))
        stack.start()
    try:
        _note(console, f"a whole stack runs at {stack.url}", seconds=time.monotonic() - began)
        yield Access(url=stack.url, api_key=stack.api_key)
    finally:
        with console.status("Stopping the stack …"):
            stack.stop()


def _run_job(client: Client, picture: Path, console: Console) -> tuple[Json, Message | None]:
    began = time.monotonic()
    with run_receiver() as receiver, console.status("Submitting the scene …") as line:
        job = client.submit_file(
            picture,
            mode=MODE,
            options={"outputs": ["mask", "overlay"]},
            webhook_url=receiver.url,
            metadata={"scene": SCENE},
        )
        _note(console, f"a drawn scene was submitted as job {job['id']}", seconds=time.monotonic() - began)

        def show(kind: str, told: Json) -> None:
            line.update(Text(f"The job is {told.get('stage') or told.get('state') or kind} …"))

        began = time.monotonic()
        job = client.wait(job["id"], on_event=show, timeout_seconds=JOB_SECONDS)
        _note(
            console, f"the job has {job['state']}", seconds=time.monotonic() - began, good=job["state"] == "succeeded"
        )
        line.update("Waiting for the webhook …")
        return job, receiver.wait_for(job["id"], seconds=WEBHOOK_SECONDS)


def _run_recording(client: Client, out: Path, console: Console) -> Json:
    began = time.monotonic()
    with console.status("Drawing a recording …") as line:

        def show(kind: str, told: Json) -> None:
            done = f"{told['done']} of {told['total']} frames" if told.get("total") else ""
            line.update(Text(f"The recording is {told.get('stage') or told.get('state') or kind} {done}"))

        told = run_recording(client, out, show=show)
    says = f"a recording of {told['frames']} frames was segmented as job {told['job_id']}: mIoU {told['miou']}"
    good = told["state"] == "succeeded"
    _note(console, says if good else "the recording was not segmented", seconds=time.monotonic() - began, good=good)
    return told


def _verify(message: Message | None, *, secret: str, job_id: str) -> bool:
    """Whether the reference library accepts the signature, and the message speaks of this job's success."""
    if message is None:
        return False
    try:
        event = Webhook(secret).verify(message.body, message.headers)
    except WebhookVerificationError:
        return False
    return bool(event["type"] == "job.succeeded" and event["data"]["id"] == job_id)


def _find_problems(summary: Json) -> Iterator[str]:
    if summary["state"] != "succeeded":
        error = summary["error"] or {"code": "no reason", "detail": "the job has none to give"}
        yield f"the job {summary['state']}: {error['code']}: {error['detail']}"
    elif summary["miou"] < LEAST_MIOU:
        yield f"the mask agrees with the truth by {summary['miou']:.3f} mIoU, less than {LEAST_MIOU}"
    moving = summary["recording"]
    if moving["state"] != "succeeded":
        yield f"the recording {moving['state']}: {(moving['error'] or {}).get('detail')}"
    elif moving["miou"] < LEAST_MIOU:
        yield f"the recording's masks agree with the truth by {moving['miou']:.3f} mIoU, less than {LEAST_MIOU}"
    if not summary["webhook_verified"]:
        yield "no webhook with a valid signature said that the job succeeded"


def _tell(console: Console, summary: Json, problems: Sequence[str], out: Path) -> None:
    if summary["miou"] is not None:
        good = summary["miou"] >= LEAST_MIOU
        _note(console, f"its mask agrees with the truth: mIoU {summary['miou']:.3f}", good=good)
    console.print()
    for problem in problems:
        console.print(Text(f"✗ {problem}", style="bold red"), soft_wrap=True)
    console.print(Text(f"Look at {out / 'picture.png'}, or at all of {out}/:", style="bold"), soft_wrap=True)
    recorded = {f"recording/{name}": says for name, says in RECORDING_FILES.items()}
    for name, says in (FILES | recorded).items():
        if (out / name).exists():
            console.print(f"  {name:<21} {says}", markup=False)
    console.print(f"{summary['demo_seconds']:.1f} s in all.")


def _note(console: Console, says: str, *, seconds: float | None = None, good: bool = True) -> None:
    mark = Text("✓ ", style="green") if good else Text("✗ ", style="bold red")
    took = Text("" if seconds is None else f"  {seconds:.1f} s", style="dim")
    console.print(mark + Text(says) + took, soft_wrap=True)
