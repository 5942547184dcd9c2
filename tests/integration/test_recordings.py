"""Recordings on real servers, start to end: submitted, probed, made in chunks by any worker, and joined."""

import io
import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from shared import lifecycle
from shared.broker import IO
from shared.config import Recordings, Settings
from shared.db import SessionFactory
from shared.inference.mask_video import read_masks
from shared.inference.masks import decode_mask
from shared.models import Job, JobState, StepKind, StepState
from shared.storage import job_prefix
from tests.integration.conftest import Submit, problem, read_job, read_only, read_steps
from tests.integration.takeover import take_back
from tests.integration.workbench import FakeEngine, Workbench, nothing
from tests.recordings import FRAMES, GOP, encode, packet_places, read_number

FULL_AT_BYTES = 16_000


def see_number(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A mask that says of which frame it is: its number's digits to the base of 8, one to a row."""
    number = read_number(image)
    mask = np.ones(image.shape[:2], dtype=np.uint8)
    for row in range(3):
        mask[row] = 1 + number // 8**row % 8
    return mask


def number_of(mask: NDArray[np.uint8]) -> int:
    return sum((int(mask[row, 0]) - 1) * 8**row for row in range(3))


@pytest.fixture(scope="module")
def recording() -> bytes:
    """Of three groups of twelve frames and one of four."""
    buffer = io.BytesIO()
    encode(buffer, "libx264", container="mp4")
    return buffer.getvalue()


@pytest.fixture
def workers(workbench: Workbench, settings: Settings) -> Workbench:
    """Workers that plan chunks of ten frames and see the number in each frame."""
    short = settings.model_copy(
        update={"recordings": Recordings(chunk_seconds=5)}
    )  # half a second per frame is assumed
    return replace(workbench, settings=short, label=see_number)


@pytest.fixture
def queued(submit: Submit, sessions: SessionFactory, recording: bytes) -> Callable[..., Job]:
    def send(file: bytes = recording, **options: Any) -> Job:
        answer = submit(file=file, options=options)
        assert answer.status_code == 202, answer.text
        assert answer.json()["kind"] == "recording"
        return read_only(sessions, Job)

    return send


def run_all(workers: Workbench, meanwhile: Callable[[], None] = nothing) -> FakeEngine:
    workers.run(queue_name=IO)
    engine = workers.run(meanwhile)
    workers.run(queue_name=IO)
    return engine


@pytest.fixture
def fetch(api: TestClient, tmp_path: Path) -> Callable[[Job, str], Path]:
    """A file of a job's result, by its link."""

    def get(job: Job, name: str) -> Path:
        manifest = api.get(f"/v1/jobs/{job.id}/result").json()
        [file] = [each for each in manifest["files"] if each["name"] == name]
        path = tmp_path / name
        path.write_bytes(httpx2.get(file["url"]).raise_for_status().content)
        return path

    return get


Fetch = Callable[[Job, str], Path]
Queued = Callable[..., Job]


def test_every_frame_has_its_own_mask_at_its_own_time(
    queued: Queued, workers: Workbench, sessions: SessionFactory, fetch: Fetch
) -> None:
    job = queued()
    run_all(workers)
    assert read_job(sessions, job).state == JobState.SUCCEEDED
    found = [(pts, number_of(mask)) for pts, mask in read_masks(fetch(job, "masks.mkv"))]
    assert found == [(512 * number, number) for number in range(FRAMES)]
    steps = read_steps(sessions, job)
    assert [step.kind for step in steps] == [StepKind.PROBE, *[StepKind.INFER] * 4, StepKind.FINALIZE]


def test_the_manifest_says_what_was_read_and_made(
    queued: Queued, workers: Workbench, api: TestClient, sessions: SessionFactory
) -> None:
    job = queued(outputs=["mask", "overlay"])
    run_all(workers)
    manifest = api.get(f"/v1/jobs/{job.id}/result").json()
    assert [file["name"] for file in manifest["files"]] == [
        "masks.mkv", "overlay.mp4", "areas.parquet", "areas.jsonl", "frames.parquet", "classes.json",
    ]  # fmt: skip
    assert manifest["frames"] == {"source": FRAMES, "processed": FRAMES, "bad": []}
    assert (manifest["source"]["width"], manifest["source"]["height"]) == (96, 64)
    assert (manifest["source"]["codec"], manifest["source"]["time_base"]) == ("h264", "1/12800")
    assert sum(each["pixels"] for each in manifest["classes"]) == FRAMES * 96 * 64
    job_now = api.get(f"/v1/jobs/{job.id}").json()
    assert job_now["timing"]["frames"] == FRAMES
    assert job_now["timing"]["inference_seconds"] == pytest.approx(FRAMES * 0.2)
    assert job_now["progress"]["done"] == job_now["progress"]["total"] == FRAMES


def test_areas_and_frames_are_tables(queued: Queued, workers: Workbench, fetch: Fetch) -> None:
    job = queued(frames={"every": 2})
    run_all(workers)
    areas = pyarrow.parquet.read_table(fetch(job, "areas.parquet")).to_pylist()
    assert sorted({row["frame"] for row in areas}) == list(range(0, FRAMES, 2))
    assert sum(row["pixels"] for row in areas) == FRAMES // 2 * 96 * 64
    lines = [json.loads(line) for line in fetch(job, "areas.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(0, FRAMES, 2))
    frames = pyarrow.parquet.read_table(fetch(job, "frames.parquet")).to_pylist()
    assert [row["processed"] for row in frames] == [number % 2 == 0 for number in range(FRAMES)]


@pytest.mark.parametrize(
    ("frames", "numbers"),
    [
        ({"every": 7}, range(0, FRAMES, 7)),
        ({"fps": 5}, range(0, FRAMES, 5)),
        ({"from_seconds": 0.4, "to_seconds": 0.6}, range(10, 15)),
    ],
)
def test_the_frames_that_were_asked_for_are_made_and_no_others(
    frames: dict[str, Any], numbers: range, queued: Queued, workers: Workbench, fetch: Fetch
) -> None:
    job = queued(frames=frames)
    engine = run_all(workers)
    assert [number_of(mask) for _, mask in read_masks(fetch(job, "masks.mkv"))] == list(numbers)
    assert len(engine.asked) == len(numbers)


def test_the_mask_of_one_frame_can_be_had_alone(
    queued: Queued, workers: Workbench, api: TestClient, foreign: dict[str, str]
) -> None:
    job = queued(frames={"every": 3})
    run_all(workers)
    for number in (0, 27, 39):
        answer = api.get(f"/v1/jobs/{job.id}/frames/{number}.png")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        assert number_of(decode_mask(answer.content)) == number
    for number in (1, 40, 10**18):
        problem(api.get(f"/v1/jobs/{job.id}/frames/{number}.png"), 404, "not_found")
    problem(api.get(f"/v1/jobs/{job.id}/frames/-1.png"), 422, "invalid_request")
    problem(api.get(f"/v1/jobs/{job.id}/frames/0.png", headers=foreign), 404, "not_found")


def test_a_lost_worker_costs_its_chunk_and_no_other(
    queued: Queued, workers: Workbench, sessions: SessionFactory, fetch: Fetch
) -> None:
    job = queued()
    workers.run(queue_name=IO)
    turns = iter(range(100))

    def lose_the_second_chunk() -> None:
        if next(turns) == 15:
            take_back(sessions, job)

    engine = workers.run(lose_the_second_chunk)
    workers.run(queue_name=IO)
    assert [number_of(mask) for _, mask in read_masks(fetch(job, "masks.mkv"))] == list(range(FRAMES))
    assert len(engine.asked) <= FRAMES + GOP
    assert [step.attempt for step in read_steps(sessions, job)] == [1, 1, 2, 1, 1, 1]


def test_a_canceled_recording_keeps_its_chunks_for_a_retry(
    queued: Queued, workers: Workbench, sessions: SessionFactory, fetch: Fetch, api: TestClient
) -> None:
    job = queued()
    workers.run(queue_name=IO)
    turns = iter(range(100))

    def cancel() -> None:
        if next(turns) == 25:
            with sessions.begin() as session:
                lifecycle.request_cancel(session, job.id)

    workers.run(cancel)
    assert read_job(sessions, job).state == JobState.CANCELED
    assert [step.state for step in read_steps(sessions, job)].count(StepState.DONE) == 3, "the probe and two chunks"
    assert api.post(f"/v1/jobs/{job.id}/retry").status_code == 202
    engine = run_all(workers)
    assert len(engine.asked) == FRAMES - 2 * GOP
    assert [number_of(mask) for _, mask in read_masks(fetch(job, "masks.mkv"))] == list(range(FRAMES))


def test_what_is_no_recording_fails_by_name(
    queued: Queued, workers: Workbench, sessions: SessionFactory, recording: bytes
) -> None:
    job = queued(file=recording[:200] + b"\x00" * 100)
    run_all(workers)
    failed = read_job(sessions, job)
    assert failed.state == JobState.FAILED
    assert failed.error is not None
    assert (failed.error["code"], failed.error["retryable"]) == ("invalid_media", False)


def test_a_span_without_frames_fails_by_name(queued: Queued, workers: Workbench, sessions: SessionFactory) -> None:
    job = queued(frames={"from_seconds": 100})
    run_all(workers)
    failed = read_job(sessions, job)
    assert failed.error is not None
    assert failed.error["code"] == "invalid_media"
    assert "span" in failed.error["detail"]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Every frame by itself; all but the first two are destroyed."""
    path = tmp_path_factory.mktemp("damaged") / "clip.mp4"
    encode(path, "libx264", options={"g": "1"})
    content = bytearray(path.read_bytes())
    for place, size in packet_places(path)[2:]:
        content[place : place + size] = b"\xff" * size
    return bytes(content)


def test_damaged_frames_have_masks_of_0_and_are_named(
    queued: Queued, workers: Workbench, api: TestClient, fetch: Fetch, damaged: bytes
) -> None:
    job = queued(damaged, max_bad_frames=1)
    run_all(workers)
    masks = [mask for _, mask in read_masks(fetch(job, "masks.mkv"))]
    assert [number_of(mask) for mask in masks[:2]] == [0, 1]
    assert len(masks) == FRAMES
    assert not any(mask.any() for mask in masks[2:])
    assert api.get(f"/v1/jobs/{job.id}/result").json()["frames"]["bad"] == list(range(2, FRAMES))


def test_a_recording_without_a_sound_frame_was_made_by_no_model(
    queued: Queued, workers: Workbench, api: TestClient, damaged: bytes
) -> None:
    job = queued(damaged, max_bad_frames=1, frames={"from_seconds": 0.08}, outputs=["mask", "overlay"])
    run_all(workers)
    told = api.get(f"/v1/jobs/{job.id}").json()
    assert (told["state"], told["model"]) == ("succeeded", None)
    manifest = api.get(f"/v1/jobs/{job.id}/result").json()
    assert (manifest["model"], manifest["classes"]) == (None, [])
    assert "overlay.mp4" not in {file["name"] for file in manifest["files"]}


def test_more_damage_than_was_agreed_to_fails_the_job(
    queued: Queued, workers: Workbench, sessions: SessionFactory, damaged: bytes
) -> None:
    job = queued(damaged, max_bad_frames=0.9)
    run_all(workers)
    failed = read_job(sessions, job)
    assert failed.error is not None
    assert (failed.error["code"], failed.error["retryable"]) == ("too_many_bad_frames", False)


def test_an_image_has_no_frames_to_choose_from(submit: Submit) -> None:
    answer = submit(options={"frames": {"every": 2}})
    assert (answer.status_code, answer.json()["code"]) == (422, "kind_mismatch")


# --- the worker's disk ---------------------------------------------------------------------------------------------


def see_noise(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A mask that nothing makes small."""
    return np.random.default_rng(0).integers(1, 9, image.shape[:2], dtype=np.uint8)


def test_a_chunk_that_does_not_fit_on_the_workers_disk_is_put_off_with_the_reason(
    queued: Queued, workers: Workbench, sessions: SessionFactory
) -> None:
    job = queued()
    workers.run(queue_name=IO)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, hard))
    try:
        replace(workers, label=see_noise).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    chunks = [step for step in read_steps(sessions, job) if step.kind == StepKind.INFER]
    assert {(step.state, step.error and step.error["code"]) for step in chunks} == {(StepState.QUEUED, "disk_full")}
    made = [key for key in workers.storage.list_keys(job_prefix(job.tenant_id, job.id)) if "/attempts/" in key]
    assert [key for key in made if "/steps/00000/" not in key] == [], "nothing but what the probe made"
