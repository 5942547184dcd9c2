"""The `maskline` command against a whole stack: what is typed, what comes back, and with which exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.acceptance.conftest import SLOW, Service

MASKLINE = str(Path(sys.executable).with_name("maskline"))


@pytest.fixture
def command(service: Service, tmp_path: Path, scene: bytes) -> "Command":
    (tmp_path / "scene.png").write_bytes(scene)
    (tmp_path / "letter.jpg").write_text("no image at all")
    return Command(service, tmp_path)


class Command:
    def __init__(self, service: Service, folder: Path) -> None:
        self.folder = folder
        access = {"MASKLINE_URL": service.stack.url, "MASKLINE_API_KEY": service.stack.api_key}
        self._environment = {**os.environ, **access}

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [MASKLINE, *arguments], cwd=self.folder, env=self._environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err


def test_a_file_becomes_a_mask_in_a_folder(command: Command) -> None:
    status, out, err = command.run("submit", "scene.png", "--mode", "demo", "--overlay", "--out", "masks")
    assert status == 0, err
    assert "succeeded  scene.png" in out
    assert {path.name for path in (command.folder / "masks" / "scene").iterdir()} == {
        "mask.png", "overlay.png", "manifest.json",
    }  # fmt: skip


def test_one_bad_file_does_not_keep_the_good_one_back(command: Command) -> None:
    status, out, _ = command.run("submit", "letter.jpg", "scene.png", "-m", "demo", "--wait", "--json")
    assert status == 1
    letter, scene = (json.loads(line) for line in out.splitlines())
    assert letter["error"]["code"] == "invalid_media"
    assert scene["state"] == "succeeded"


def test_a_job_is_found_again_by_its_id(command: Command) -> None:
    _, out, _ = command.run("submit", "scene.png", "-m", "demo", "--wait", "--json")
    job = json.loads(out)
    assert job["id"] in command.run("jobs", "--state", "succeeded", "--limit", "5")[1]
    assert "inference" in command.run("status", job["id"])[1]
    assert command.run("result", job["id"], "--out", "again")[0] == 0
    assert (command.folder / "again" / "mask.png").is_file()


def test_what_the_service_refuses_has_a_status_of_its_own(command: Command) -> None:
    _, out, _ = command.run("submit", "scene.png", "-m", "demo", "--wait", "--json")
    status, _, err = command.run("cancel", json.loads(out)["id"])
    assert status == 4
    assert "invalid_state" in err
    status, _, err = command.run("submit", "scene.png", "--mode", "best")
    assert status == 4
    assert err.startswith("maskline: scene.png: ")


def test_an_interrupted_wait_says_that_the_job_goes_on_and_how_to_find_it(command: Command, large_scene: bytes) -> None:
    (command.folder / "large.png").write_bytes(large_scene)
    waiting = command.start("submit", "large.png", "-m", "demo", "--input-size", str(SLOW["input_size"]), "--wait")
    deadline = time.monotonic() + 60
    while '"id"' not in (listed := command.run("jobs", "--state", "running", "--json")[1]):
        assert time.monotonic() < deadline, "the job did not start"
    [job] = [json.loads(line) for line in listed.splitlines()]
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=20)
    assert waiting.returncode == 130
    assert f"the job goes on: maskline status {job['id']}" in err
    status, out, _ = command.run("cancel", job["id"])
    assert (status, out.split()[0]) == (0, job["id"])
