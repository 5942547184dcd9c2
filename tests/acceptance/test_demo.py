"""`maskline demo`, as a newcomer types it: one command, in an empty folder, and everything is there."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.acceptance.conftest import Service

MASKLINE = str(Path(sys.executable).with_name("maskline"))
DEMO_SECONDS = 280
FILES = {"input.png", "mask.png", "overlay.png", "picture.png", "manifest.json", "summary.json"}


@pytest.fixture
def folder() -> Iterator[Path]:
    # PostgreSQL may run as another user, to whom pytest's own folders are closed.
    path = Path(tempfile.mkdtemp(prefix="maskline-"))
    yield path
    shutil.rmtree(path)


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASKLINE_")}
    return subprocess.run(
        [MASKLINE, "demo", *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=DEMO_SECONDS, check=False,
    )  # fmt: skip


def check_output(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES | {"recording"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "succeeded"
    assert summary["mode"] == "demo"
    assert summary["webhook_verified"] is True
    assert summary["miou"] >= 0.85
    assert {"queued", "inference", "upload", "total"} <= summary["seconds"].keys()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["job_id"] == summary["job_id"]
    assert {file["name"] for file in manifest["files"]} == {"mask.png", "overlay.png"}
    moving = summary["recording"]
    assert (moving["state"], moving["frames"]) == ("succeeded", 24)
    assert moving["miou"] >= 0.85
    assert {"input.mp4", "masks.mkv", "overlay.mp4", "areas.png", "areas.jsonl"} <= {
        path.name for path in (folder / "recording").iterdir()
    }
    with Image.open(folder / "input.png") as sent, Image.open(folder / "mask.png") as mask:
        assert mask.mode == "L"
        assert mask.size == sent.size


def test_it_starts_a_stack_shows_the_result_and_leaves_nothing_running(folder: Path) -> None:
    done = run_demo(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mIoU 0." in done.stdout
    assert "demo-output/picture.png" in done.stdout
    check_output(folder / "demo-output")
    assert not (folder / ".maskline" / "stack.json").exists()
    assert not list((folder / ".maskline" / "run").glob("*.pid"))


def test_it_uses_the_stack_that_runs_already_and_leaves_it_running(service: Service, folder: Path) -> None:
    done = run_demo(folder, "--data", str(service.stack.path), "--out", "shown")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"is running: {service.stack.url}" in done.stdout
    check_output(folder / "shown")
    assert service.http.get("/readyz").json()["status"] == "ready"
