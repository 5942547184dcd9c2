"""`maskline archive` against a whole stack: a folder in, a folder out, and whatever ends it in between."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.local.stack import SOURCES
from shared.inference.mask_video import read_masks
from tests.acceptance.conftest import Service
from tests.recordings import encode

MASKLINE = str(Path(sys.executable).with_name("maskline"))
FRAMES = 4
RESULT = {"masks.mkv", "areas.parquet", "areas.jsonl", "frames.parquet", "classes.json", "manifest.json"}
SLOW = ("--input-size", "768")


class Archive:
    """The command, on a folder of its own and into another."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.source, self.out = folder / "recordings", folder / "masks"
        self.prefix = f"{uuid.uuid4()}/"
        self._folder = folder
        access = {"MASKLINE_URL": service.stack.url, "MASKLINE_API_KEY": service.stack.api_key}
        self._environment = {**os.environ, **access}
        self._jobs_before = 0
        self._jobs_before = self.count_jobs()

    def record(self, name: str, *, frames: int = FRAMES, codec: str = "libx264") -> Path:
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        encode(path, codec, frames=frames, options={"g": "1"} if codec == "libx264" else {})
        return path

    def put(self, name: str, content: bytes) -> None:
        """Into a bucket that the service reads."""
        self.service.storage().other(SOURCES).put(f"{self.prefix}{name}", content, content_type="a/b")

    def start(self, *arguments: str, source: str | None = None) -> "subprocess.Popen[str]":
        typed = [MASKLINE, "archive", source or str(self.source), "--mode", "demo", "--out", str(self.out), *arguments]
        return subprocess.Popen(
            typed, cwd=self._folder, env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *arguments: str, source: str | None = None) -> tuple[int, str, str]:
        with self.start(*arguments, source=source) as process:
            out, err = process.communicate(timeout=180)
        return process.returncode, out, err

    def count_jobs(self) -> int:
        [(count,)] = self.service.query("SELECT count(*) FROM jobs")
        return int(count) - self._jobs_before

    def manifest(self, name: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.out / name / "manifest.json").read_text())
        return read

    def entry(self, name: str) -> dict[str, Any] | None:
        for path in (self.out / ".archive" / "recordings").glob("*.json"):
            entry: dict[str, Any] = json.loads(path.read_text())
            if entry["name"] == name:
                return entry
        return None

    def job_id(self, name: str) -> str | None:
        entry = self.entry(name)
        return entry["job_id"] if entry is not None else None


@pytest.fixture
def archive(service: Service, tmp_path: Path) -> Archive:
    return Archive(service, tmp_path)


def wait_until(seen: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not seen():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def line_of(table: str, name: str) -> str:
    [line] = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    return line


def test_a_folder_of_all_kinds_becomes_a_folder_of_masks(archive: Archive) -> None:
    archive.record("day.mp4")
    archive.record("trips/day.mkv", frames=FRAMES + 1)
    (archive.source / "notes.txt").write_text("what was recorded where")
    broken = archive.source / "broken.mp4"
    broken.write_bytes((archive.source / "day.mp4").read_bytes()[:300])
    (archive.source / ".hidden.mp4").write_bytes(broken.read_bytes())

    status, out, err = archive.run()

    assert status == 1, err
    assert [line.split()[0] for line in out.splitlines()] == [
        "recording", "broken.mp4", "day.mp4", "trips/day.mkv", "notes.txt",
    ]  # fmt: skip
    assert "failed" in line_of(out, "broken.mp4")
    assert "invalid_media: " in line_of(out, "broken.mp4")
    assert line_of(out, "day.mp4").split()[1:3] == ["succeeded", str(FRAMES)]
    assert line_of(out, "trips/day.mkv").split()[1:3] == ["succeeded", str(FRAMES + 1)]
    assert line_of(out, "notes.txt").split()[1:] == ["not", "a", "recording"]
    for name in ("day.mp4", "trips/day.mkv"):
        assert {path.name for path in (archive.out / name).iterdir()} == RESULT
        for file in archive.manifest(name)["files"]:
            content = (archive.out / name / file["name"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert len(list(read_masks(archive.out / "day.mp4" / "masks.mkv"))) == FRAMES
    assert not (archive.out / "broken.mp4").exists()
    job = archive.service.look({"links": {"self": f"/v1/jobs/{archive.job_id('day.mp4')}"}})
    assert (job["priority"], job["metadata"]) == (-10, {"path": "day.mp4"})
    assert "day.mp4: uploading" in err
    assert "day.mp4: succeeded" in err


def test_what_is_done_is_not_done_again(archive: Archive) -> None:
    archive.record("day.mp4")
    assert archive.run()[0] == 0
    made_at = (archive.out / "day.mp4" / "masks.mkv").stat().st_mtime_ns

    status, out, err = archive.run()

    assert (status, err) == (0, "")
    assert line_of(out, "day.mp4").split()[1:3] == ["succeeded", str(FRAMES)]
    assert archive.count_jobs() == 1
    assert (archive.out / "day.mp4" / "masks.mkv").stat().st_mtime_ns == made_at


def test_an_interrupted_run_says_how_it_goes_on_and_the_next_takes_up_its_job(archive: Archive) -> None:
    archive.record("day.mp4", frames=6)
    with archive.start(*SLOW) as running:
        wait_until(lambda: archive.job_id("day.mp4"), running)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=20)
    assert running.returncode == 130
    assert err.splitlines()[-1].startswith("maskline: interrupted; what was submitted goes on in the service")
    job_id = archive.job_id("day.mp4")
    assert not (archive.out / "day.mp4" / "manifest.json").exists()

    status, _, err = archive.run(*SLOW)

    assert status == 0, err
    assert archive.manifest("day.mp4")["job_id"] == job_id
    assert archive.count_jobs() == 1


def test_a_killed_run_repeats_neither_upload_nor_job(archive: Archive) -> None:
    archive.record("day.mp4", frames=6)
    with archive.start(*SLOW) as running:
        wait_until(lambda: archive.job_id("day.mp4"), running)
        running.kill()
    # As if it had died after the service took the job, and before it could write that down.
    entry = archive.entry("day.mp4")
    assert entry is not None
    [path] = (archive.out / ".archive" / "recordings").glob("*.json")
    path.write_text(json.dumps({**entry, "job_id": None}))

    status, _, err = archive.run(*SLOW)

    assert status == 0, err
    assert archive.manifest("day.mp4")["job_id"] == entry["job_id"]
    assert archive.count_jobs() == 1


def test_a_file_that_changed_is_done_anew(archive: Archive) -> None:
    archive.record("day.mp4")
    assert archive.run("--overlay")[0] == 0
    first = archive.manifest("day.mp4")["job_id"]
    archive.record("day.mp4", frames=FRAMES + 2)

    status, out, err = archive.run("--overlay")

    assert status == 0, err
    assert line_of(out, "day.mp4").split()[1:3] == ["succeeded", str(FRAMES + 2)]
    assert archive.manifest("day.mp4")["job_id"] != first
    assert len(list(read_masks(archive.out / "day.mp4" / "masks.mkv"))) == FRAMES + 2


def test_a_result_that_is_not_whole_any_more_is_fetched_again_without_a_second_job(archive: Archive) -> None:
    archive.record("day.mp4")
    assert archive.run()[0] == 0
    (archive.out / "day.mp4" / "masks.mkv").unlink()
    assert archive.run()[0] == 0
    assert len(list(read_masks(archive.out / "day.mp4" / "masks.mkv"))) == FRAMES
    assert archive.count_jobs() == 1


def test_a_job_that_the_service_forgot_is_made_again(archive: Archive) -> None:
    archive.record("day.mp4")
    assert archive.run()[0] == 0
    archive.service.http.delete(f"/v1/jobs/{archive.job_id('day.mp4')}").raise_for_status()
    (archive.out / "day.mp4" / "manifest.json").unlink()

    status, _, err = archive.run()

    assert status == 0, err
    assert archive.service.http.get(f"/v1/jobs/{archive.job_id('day.mp4')}").json()["state"] == "succeeded"


def test_a_canceled_job_is_taken_up_by_the_next_run(archive: Archive) -> None:
    archive.record("day.mp4", frames=6)
    with archive.start(*SLOW) as running:
        wait_until(lambda: archive.job_id("day.mp4"), running)
        job_id = archive.job_id("day.mp4")
        archive.service.http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "canceled" in line_of(out, "day.mp4")

    assert archive.run(*SLOW)[0] == 0
    assert archive.manifest("day.mp4")["job_id"] == job_id


def test_a_recording_that_was_deleted_once_it_was_submitted_still_gets_its_masks(archive: Archive) -> None:
    path = archive.record("day.mp4")
    with archive.start() as running:
        wait_until(lambda: archive.job_id("day.mp4"), running)
        running.kill()
    path.unlink()
    assert archive.run()[0] == 0
    assert len(list(read_masks(archive.out / "day.mp4" / "masks.mkv"))) == FRAMES


def test_two_at_once_on_the_same_folder_are_one_too_many(archive: Archive) -> None:
    archive.record("day.mp4", frames=12)
    with archive.start(*SLOW) as running:
        wait_until(lambda: archive.job_id("day.mp4"), running)
        status, _, err = archive.run(*SLOW)
        running.kill()
    archive.service.http.post(f"/v1/jobs/{archive.job_id('day.mp4')}/cancel").raise_for_status()
    assert status == 1
    assert err == f"maskline: another `maskline archive` is at work on {archive.out}\n"


def test_another_mode_or_other_options_need_another_folder(archive: Archive) -> None:
    archive.record("day.mp4")
    assert archive.run()[0] == 0
    status, _, err = archive.run("--mode", "fast")
    assert status == 2
    assert 'holds an archive with mode "demo", not "fast": choose another --out' in err
    status, _, err = archive.run("--overlay")
    assert status == 2
    assert "holds an archive with options {}, not" in err
    assert archive.count_jobs() == 1


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--mode", "best"), 2, "there is no mode best; the modes are"),
        (("--option", "frames=7"), 2, "these options cannot be meant: frames"),
        (("--api-key", "mk_wrong"), 4, "unauthorized"),
        (("--url", "http://127.0.0.1:1"), 3, "http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_what_cannot_work_for_any_is_told_before_anything_is_done(
    archive: Archive, arguments: tuple[str, ...], status: int, says: str
) -> None:
    archive.record("day.mp4")
    ended, out, err = archive.run(*arguments)
    assert (ended, out) == (status, "")
    assert err.startswith("maskline: ")
    assert says in err
    assert not archive.out.exists()


def test_a_folder_without_a_recording_is_told(archive: Archive) -> None:
    archive.source.mkdir()
    (archive.source / "notes.txt").write_text("nothing was recorded")
    status, out, err = archive.run()
    assert (status, out) == (2, "")
    assert err == f"maskline: {archive.source} holds no recording; 1 of something else\n"


def test_a_prefix_of_a_bucket_becomes_a_folder_of_masks_and_is_not_done_twice(archive: Archive) -> None:
    for name, frames in (("day.mp4", FRAMES), ("trips/day.mkv", FRAMES + 1)):
        archive.put(name, archive.record(name, frames=frames).read_bytes())
    archive.put("notes.txt", b"what was recorded where")
    place = f"s3://{SOURCES}/{archive.prefix}"

    status, out, err = archive.run(source=place)

    assert status == 0, err
    assert line_of(out, "day.mp4").split()[1:3] == ["succeeded", str(FRAMES)]
    assert "not a recording" in line_of(out, "notes.txt")
    for name, frames in (("day.mp4", FRAMES), ("trips/day.mkv", FRAMES + 1)):
        assert {path.name for path in (archive.out / name).iterdir()} == RESULT
        assert len(list(read_masks(archive.out / name / "masks.mkv"))) == frames
        assert archive.manifest(name)["source"]["location"] == f"{place}{name}"
    assert archive.count_jobs() == 3

    status, again, err = archive.run(source=place)

    assert (status, again, archive.count_jobs()) == (0, out, 3), err


def test_a_bucket_that_the_service_does_not_read_is_told_at_once(archive: Archive) -> None:
    status, _, err = archive.run(source="s3://nobodys/films/")
    assert (status, archive.count_jobs()) == (4, 0)
    assert "this service does not read s3://nobodys/films/" in err
