"""Jobs over REST: what is accepted, what a job looks like, and what may be asked of it afterwards."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from starlette.testclient import TestClient

from shared.contract import Options
from shared.db import SessionFactory
from shared.models import Job, JobState, WebhookDelivery
from shared.storage import Storage
from tests.integration.conftest import BAD_MEDIA, Broker, MakeJob, Submit, problem, read_only, small_image, wait_until
from tests.integration.workbench import Workbench

JOB_FIELDS = {
    "id", "state", "mode", "kind", "source", "options", "metadata", "priority", "batch_id", "attempts", "progress",
    "queue_position", "cancel_requested_at", "created_at", "started_at", "finished_at", "expires_at", "timing", "model",
    "error", "links",
}  # fmt: skip
PROGRESS_FIELDS = {"stage", "done", "total", "unit", "frames_per_second", "eta_seconds"}
TIMING_FIELDS = {
    "queued_seconds", "preprocess_seconds", "inference_seconds", "postprocess_seconds", "encode_seconds",
    "upload_seconds", "total_seconds", "frames", "peak_gpu_bytes", "device",
}  # fmt: skip
LINKS = {"self", "events", "result", "cancel", "retry"}


# --- submitting ----------------------------------------------------------------------------------------------------


def test_a_form_with_a_file_is_accepted_and_says_where_to_look(submit: Submit) -> None:
    answer = submit()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    assert int(answer.headers["retry-after"]) >= 1


def test_the_file_is_stored_as_it_was_sent(submit: Submit, sessions: SessionFactory, storage: Storage) -> None:
    sent = small_image()
    submit(file=sent)
    source = read_only(sessions, Job).source
    assert storage.read(source["key"], etag=source["etag"], limit_bytes=10**6) == sent
    assert source["size_bytes"] == len(sent)


def test_a_large_file_arrives_whole(submit: Submit, sessions: SessionFactory, storage: Storage) -> None:
    """Large enough that it does not stay in memory on its way."""
    sent = bytes(range(256)) * 12_000
    assert submit(file=sent).status_code == 202
    assert storage.read(read_only(sessions, Job).source["key"], limit_bytes=10**7) == sent


def test_what_was_asked_for_is_echoed(submit: Submit) -> None:
    job = submit(
        mode="fast", options={"input_size": 320, "outputs": ["mask", "overlay"]}, metadata={"camera": [1, None, "ä"]},
        priority=-3,
    ).json()  # fmt: skip
    assert job["mode"] == "fast"
    assert job["options"] == Options(input_size=320, outputs=("mask", "overlay")).model_dump(mode="json")
    assert job["metadata"] == {"camera": [1, None, "ä"]}
    assert job["priority"] == -3


def test_what_is_left_out_has_its_default(submit: Submit) -> None:
    job = submit().json()
    assert (job["state"], job["kind"], job["priority"], job["metadata"]) == ("queued", "image", 0, {})
    assert job["options"] == Options().model_dump(mode="json")


def test_a_submission_wakes_a_worker_for_its_step(broker: Broker, submit: Submit) -> None:
    submit()
    wait_until(lambda: len(broker.steps()) == 1)


def test_a_filename_is_only_a_name(api: TestClient, sessions: SessionFactory, subtests: pytest.Subtests) -> None:
    for sent, kept in {
        "../../etc/passwd.png": "passwd.png",
        "C:\\photos\\a.png": "a.png",
        "ä b.png": "ä b.png",
        "x" * 4000 + ".png": "x" * 255,
        "a\x1b[31m.png": "a[31m.png",
    }.items():
        with subtests.test(sent=sent[:80]):
            job = api.post("/v1/jobs", data={"mode": "demo"}, files={"file": (sent, small_image())}).json()
            with sessions() as session:
                assert session.get_one(Job, uuid.UUID(job["id"])).source["filename"] == kept


# --- what a job looks like -----------------------------------------------------------------------------------------


def test_a_queued_job_has_exactly_the_fields_of_the_contract(submit: Submit) -> None:
    job = submit().json()
    assert set(job) == JOB_FIELDS
    assert set(job["progress"]) == PROGRESS_FIELDS
    assert set(job["timing"]) >= TIMING_FIELDS
    assert set(job["links"]) == LINKS
    assert (job["model"], job["error"], job["batch_id"]) == (None, None, None)


def test_a_finished_job_says_what_made_it_and_how_long_each_stage_took(
    api: TestClient, submit: Submit, workbench: Workbench
) -> None:
    submitted = submit().json()
    workbench.run()
    job = api.get(submitted["links"]["self"]).json()
    assert set(job) == JOB_FIELDS
    assert (job["state"], job["attempts"], job["progress"]["done"], job["progress"]["total"]) == ("succeeded", 1, 1, 1)
    assert job["model"] == {"name": "a fake model", "revision": "1", "dtype": "float32", "input_size": [64, 32]}
    measured = {name: job["timing"][name] for name in TIMING_FIELDS - {"peak_gpu_bytes", "device", "frames"}}
    assert all(seconds >= 0 for seconds in measured.values())
    assert job["timing"]["total_seconds"] >= job["timing"]["queued_seconds"]


def test_times_are_rfc_3339_in_utc(api: TestClient, submit: Submit, workbench: Workbench) -> None:
    submitted = submit().json()
    workbench.run()
    job = api.get(submitted["links"]["self"]).json()
    times = [job[name] for name in ("created_at", "started_at", "finished_at", "expires_at")]
    assert all(moment.endswith("Z") for moment in times)
    assert times == sorted(times, key=datetime.fromisoformat)


def test_a_failed_job_says_why_and_whether_trying_again_helps(api: TestClient, job_in: MakeJob) -> None:
    job = api.get(f"/v1/jobs/{job_in(JobState.FAILED).id}").json()
    assert job["error"] == BAD_MEDIA.model_dump()


def test_a_queued_job_knows_how_many_go_before_it(api: TestClient, submit: Submit) -> None:
    first, second = submit().json(), submit().json()
    assert [api.get(job["links"]["self"]).json()["queue_position"] for job in (first, second)] == [0, 1]


def test_every_link_of_a_job_leads_somewhere(api: TestClient, submit: Submit, workbench: Workbench) -> None:
    links = submit().json()["links"]
    workbench.run()
    assert api.get(links["self"]).status_code == 200
    assert api.get(links["result"]).status_code == 200
    assert api.get(links["events"]).status_code == 200
    problem(api.post(links["cancel"]), 409, "invalid_state")
    problem(api.post(links["retry"]), 409, "invalid_state")


# --- waiting for it ------------------------------------------------------------------------------------------------


def test_a_job_that_ends_while_the_client_waits_is_answered_finished(submit: Submit, workbench: Workbench) -> None:
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(workbench.run_one)
        answer = submit(headers={"Prefer": "wait=60"})
        working.result()
    assert answer.status_code == 200
    assert answer.json()["state"] == "succeeded"
    assert answer.headers["location"] == answer.json()["links"]["self"]


def test_a_job_that_does_not_end_in_time_is_answered_as_it_is(submit: Submit) -> None:
    answer = submit(headers={"Prefer": "respond-async, wait=1"})
    assert answer.status_code == 202
    assert answer.json()["state"] == "queued"
    assert answer.headers["retry-after"]


@pytest.mark.parametrize(
    "prefer", ["", "wait", "wait=", "wait=-5", "wait=soon", "wait=0", "return=minimal", "await=60"]
)
def test_a_preference_that_says_nothing_of_waiting_is_ignored(submit: Submit, prefer: str) -> None:
    assert submit(headers={"Prefer": prefer}).status_code == 202


# --- cancel, retry, delete -----------------------------------------------------------------------------------------


def test_canceling_a_queued_job_ends_it(api: TestClient, submit: Submit) -> None:
    answer = api.post(submit().json()["links"]["cancel"])
    assert answer.status_code == 202
    assert answer.json()["state"] == "canceled"


def test_canceling_a_running_job_asks_its_worker_to_stop(api: TestClient, job_in: MakeJob) -> None:
    job = job_in(JobState.RUNNING)
    answer = api.post(f"/v1/jobs/{job.id}/cancel")
    assert answer.status_code == 202
    assert (answer.json()["state"], bool(answer.json()["cancel_requested_at"])) == ("running", True)


def test_canceling_twice_is_the_same_as_once(api: TestClient, job_in: MakeJob) -> None:
    cancel = f"/v1/jobs/{job_in(JobState.RUNNING).id}/cancel"
    assert api.post(cancel).json()["cancel_requested_at"] == api.post(cancel).json()["cancel_requested_at"]


@pytest.mark.parametrize("state", [state for state in JobState if state.is_terminal])
def test_a_finished_job_is_not_canceled(api: TestClient, job_in: MakeJob, state: JobState) -> None:
    problem(api.post(f"/v1/jobs/{job_in(state).id}/cancel"), 409, "invalid_state")


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELED, JobState.EXPIRED])
def test_a_job_that_ended_without_a_result_is_queued_again(
    api: TestClient, broker: Broker, job_in: MakeJob, state: JobState
) -> None:
    job = job_in(state)
    answer = api.post(f"/v1/jobs/{job.id}/retry")
    assert answer.status_code == 202
    again = answer.json()
    assert (again["id"], again["state"], again["error"]) == (str(job.id), "queued", None)
    assert (again["started_at"], again["finished_at"], again["cancel_requested_at"]) == (None, None, None)
    wait_until(lambda: len(broker.steps()) == 1)


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED])
def test_a_job_that_runs_or_succeeded_is_not_retried(api: TestClient, job_in: MakeJob, state: JobState) -> None:
    problem(api.post(f"/v1/jobs/{job_in(state).id}/retry"), 409, "invalid_state")


def test_a_deleted_job_is_gone_for_every_reader_at_once(api: TestClient, submit: Submit, workbench: Workbench) -> None:
    links = submit().json()["links"]
    workbench.run()
    assert api.delete(links["self"]).status_code == 204
    for path in (links["self"], links["events"], links["result"], f"{links['self']}/files/mask.png"):
        problem(api.get(path), 404, "not_found")
    for path in (links["cancel"], links["retry"]):
        problem(api.post(path), 404, "not_found")
    problem(api.delete(links["self"]), 404, "not_found")
    assert api.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
def test_a_job_that_has_not_ended_is_not_deleted(api: TestClient, job_in: MakeJob, state: JobState) -> None:
    job = job_in(state)
    problem(api.delete(f"/v1/jobs/{job.id}"), 409, "job_active")
    assert api.get(f"/v1/jobs/{job.id}").status_code == 200


# --- its webhook ---------------------------------------------------------------------------------------------------


def test_the_address_of_the_webhook_is_kept_and_not_shown(submit: Submit, sessions: SessionFactory) -> None:
    answer = submit(webhook_url="https://receiver.example/hook?token=secret")
    assert read_only(sessions, Job).webhook_url == "https://receiver.example/hook?token=secret"
    assert "secret" not in json.dumps(answer.json())


def test_a_webhook_tells_the_same_job_as_the_api(
    api: TestClient, submit: Submit, workbench: Workbench, sessions: SessionFactory
) -> None:
    links: dict[str, Any] = submit(webhook_url="https://receiver.example/hook").json()["links"]
    workbench.run()
    told = json.loads(read_only(sessions, WebhookDelivery).body)
    assert told["type"] == "job.succeeded"
    assert told["data"] == api.get(links["self"]).json()
