"""A recording on the whole stack, while its workers are killed: the kill test.

`pytest tests/acceptance/test_recordings.py --kills 20` kills more often, and of a longer recording.
"""

import random
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from shared.inference.mask_video import read_masks
from tests.acceptance.conftest import Service, make_recording

CHUNK_SECONDS = 0.3
"""About what a chunk of one frame takes with these options, of which a kill hits any moment."""
OPTIONS = {"input_size": 768, "outputs": ["mask", "overlay"]}


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--kills"))


def count_done(service: Service, job: dict[str, Any]) -> int:
    done = f"SELECT count(*) FROM steps WHERE job_id = '{job['id']}' AND kind = 'infer' AND state = 'done'"  # noqa: S608
    return int(service.query(done)[0][0])


def wait_for_chunks(service: Service, job: dict[str, Any], count: int) -> None:
    deadline = time.monotonic() + 120
    while count_done(service, job) < count:
        assert time.monotonic() < deadline, service.look(job)
        time.sleep(0.05)


def test_kills_leave_no_trace_in_the_result_and_cost_one_chunk_each(
    service: Service, kills: int, tmp_path: Path
) -> None:
    chunks = 3 * kills + 3
    recording, moments = make_recording(chunks), random.Random(0)
    undisturbed = service.wait_for(service.submit(recording, name="clip.mp4", options=OPTIONS))
    assert undisturbed["state"] == "succeeded", undisturbed
    job = service.submit(recording, name="clip.mp4", options=OPTIONS)
    for number in range(kills):
        wait_for_chunks(service, job, 3 * number + 1)
        time.sleep(moments.uniform(0, CHUNK_SECONDS))
        service.kill_gpu_child()
    disturbed = service.wait_for(job)
    assert disturbed["state"] == "succeeded", disturbed
    assert service.result(job)["chunks"] == chunks
    digests = [
        {file["name"]: file["sha256"] for file in service.result(each)["files"]} for each in (undisturbed, disturbed)
    ]
    assert digests[0] == digests[1]
    started = [event for event in service.events(job, "attempt") if event["outcome"] == "started"]
    recomputed = len(started) - (chunks + 2)
    assert 0 < recomputed <= kills
    [video] = [file for file in service.result(job)["files"] if file["name"] == "masks.mkv"]
    (tmp_path / "masks.mkv").write_bytes(httpx2.get(video["url"]).raise_for_status().content)
    assert len(list(read_masks(tmp_path / "masks.mkv"))) == chunks
