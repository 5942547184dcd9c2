"""Killed at the very moment between two writes: whichever of them was the last, the promise holds."""

import json
import os
import signal
import uuid
from typing import Any

import httpx2
import pytest

from tests.acceptance.conftest import Service, make_recording, wait_until
from tests.receiver import Receiver

CHUNKS = 3


@pytest.fixture(scope="module")
def recording() -> bytes:
    return make_recording(frames=CHUNKS)


@pytest.fixture(scope="module")
def digests(service: Service, recording: bytes) -> dict[str, str]:
    """Of the files of a run that nothing disturbed."""
    job = service.wait_for(service.submit(recording, name="clip.mp4"))
    assert job["state"] == "succeeded", job
    return read_digests(service, job)


def read_digests(service: Service, job: dict[str, Any]) -> dict[str, str]:
    return {file["name"]: file["sha256"] for file in service.result(job)["files"]}


@pytest.mark.parametrize(
    ("point", "step"),
    [("probe-made", 0), ("infer-made", 1), ("finalize-made", CHUNKS + 1), ("manifest-unwritten", CHUNKS + 1)],
)
def test_a_step_whose_files_no_row_tells_of_is_made_again_and_alone(
    service: Service, recording: bytes, digests: dict[str, str], point: str, step: int
) -> None:
    service.arm(point)
    job = service.submit(recording, name="clip.mp4")
    service.wait_for_fault(point)
    assert service.wait_for(job)["state"] == "succeeded"
    assert service.outcomes(job, step=step) == ["started", "lost", "started", "done"]
    others = set(range(CHUNKS + 2)) - {step}
    assert [service.outcomes(job, step=other) for other in others] == [["started", "done"]] * (CHUNKS + 1)
    assert read_digests(service, job) == digests


def test_a_result_that_nobody_was_told_of_before_the_death_is_told_all_the_same(
    service: Service, receiver: Receiver, scene: bytes
) -> None:
    service.arm("outcome-committed")
    job = service.submit(scene, webhook_url=receiver.url)
    service.wait_for_fault("outcome-committed")
    receiver.wait_for(job["id"])
    done = service.look(job)
    assert (done["state"], done["attempts"]) == ("succeeded", 1)


def test_a_webhook_whose_answer_was_not_noted_comes_twice_with_the_same_id(
    service: Service, receiver: Receiver, scene: bytes
) -> None:
    service.arm("webhook-answered")
    job = service.submit(scene, webhook_url=receiver.url)
    service.wait_for_fault("webhook-answered")
    service.query(
        f"UPDATE webhook_deliveries SET next_attempt_at = now() WHERE job_id = '{job['id']}' RETURNING id"  # noqa: S608
    )
    deliveries = receiver.wait_for(job["id"], count=2)
    assert len({each.webhook_id for each in deliveries}) == 1


@pytest.mark.parametrize(("point", "there"), [("job-uncommitted", 0), ("job-committed", 1)])
def test_a_submission_that_was_not_answered_is_one_job_when_it_comes_again(
    service: Service, scene: bytes, point: str, there: int
) -> None:
    mark = str(uuid.uuid4())
    form = {"mode": "demo", "metadata": json.dumps({"mark": mark})}

    def submit() -> httpx2.Response:
        file, key = {"file": ("scene.png", scene)}, {"Idempotency-Key": mark}
        return service.http.post("/v1/jobs", data=form, files=file, headers=key)

    count = f"SELECT id FROM jobs WHERE metadata->>'mark' = '{mark}'"  # noqa: S608
    service.arm(point)
    with pytest.raises(httpx2.TransportError):
        submit()
    service.wait_for_fault(point)
    assert len(service.query(count)) == there
    service.query(f"UPDATE idempotency_keys SET locked_until = now() WHERE key = '{mark}' RETURNING key")  # noqa: S608
    service.stack.start("api")
    answer = submit()
    assert answer.status_code == 202, answer.text
    assert [str(row[0]) for row in service.query(count)] == [answer.json()["id"]]
    assert service.wait_for(answer.json())["state"] == "succeeded"


def test_a_removal_that_died_after_the_files_takes_the_row_as_well(service: Service, scene: bytes) -> None:
    job = service.wait_for(service.submit(scene))
    rows = f"SELECT id FROM jobs WHERE id = '{job['id']}'"  # noqa: S608
    service.arm("files-purged")
    service.http.delete(job["links"]["self"]).raise_for_status()
    service.wait_for_fault("files-purged")
    assert len(service.query(rows)) == 1
    assert [key for key in service.storage().list_keys("") if job["id"] in key] == []
    service.stack.start("upkeep")
    wait_until(lambda: not service.query(rows), "the row is still there")


def test_a_cancel_that_comes_when_all_is_stored_has_its_way(service: Service, scene: bytes) -> None:
    service.arm("infer-made", "stop")
    job = service.submit(scene)
    child = service.wait_for_fault("infer-made")
    assert service.http.post(job["links"]["cancel"]).status_code == 202
    os.kill(child, signal.SIGCONT)
    assert service.wait_for(job)["state"] == "canceled"
    assert service.http.get(job["links"]["result"]).json()["code"] == "not_ready"
    assert [event["state"] for event in service.events(job, "state")] == ["queued", "running", "canceled"]


def test_a_cancel_that_comes_after_the_result_is_refused(service: Service, scene: bytes) -> None:
    service.arm("outcome-committed", "stop")
    job = service.submit(scene)
    child = service.wait_for_fault("outcome-committed")
    try:
        assert service.http.post(job["links"]["cancel"]).status_code == 409
    finally:
        os.kill(child, signal.SIGCONT)
    assert [event["state"] for event in service.events(job, "state")] == ["queued", "running", "succeeded"]
