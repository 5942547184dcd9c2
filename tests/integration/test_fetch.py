"""Sources that lie elsewhere: in other buckets and on other servers. Fetched once, pinned, and within limits."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from shared.broker import GPU, IO
from shared.config import Fetch, Settings
from shared.contract import JobKind
from shared.db import SessionFactory
from shared.errors import SourceMissing
from shared.lifecycle import ClaimedStep
from shared.models import Batch, Job, JobState, StepKind
from shared.storage import Storage, job_prefix
from tests.integration.conftest import (
    Broker,
    changed,
    count_rows,
    make_late,
    nothing_stored,
    problem,
    read_job,
    read_only,
    read_steps,
    serve,
    small_image,
    wait_until,
)
from tests.integration.scripted import Answer, ScriptedService, hang_up, say
from tests.integration.takeover import take_back
from tests.integration.workbench import WAIT_SECONDS, Workbench
from worker.housekeeping import Housekeeping
from worker.manifest import prefix_of

CONTENT = bytes(range(256)) * 16 * 1024  # 4 MiB


@pytest.fixture
def archive(settings: Settings) -> Iterator[Storage]:
    """A bucket of somebody else, which the service may read."""
    storage = Storage.from_settings(settings.storage).other(settings.storage.sources[0])
    storage.ensure_bucket()
    yield storage
    storage.delete_prefix("")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    readable = settings.storage.model_copy(update={"sources": (f"{settings.storage.bucket}-archive",)})
    limits = Fetch(allow_private_addresses=True, silent_seconds=1, source_bytes=len(CONTENT), total_timeout_seconds=20)
    return settings.model_copy(update={"storage": readable, "fetch": limits})


@pytest.fixture
def submit_source(api: TestClient) -> Callable[..., httpx2.Response]:
    def send(source: dict[str, Any], **fields: Any) -> httpx2.Response:
        return api.post("/v1/jobs", json={"source": source, "mode": "demo", **fields})

    return send


@pytest.fixture
def bucket(settings: Settings) -> str:
    return settings.storage.sources[0]


Send = Callable[..., httpx2.Response]


def put(archive: Storage, key: str, content: bytes | None = None) -> None:
    archive.put(key, small_image() if content is None else content, content_type="application/octet-stream")


def fail(sessions: SessionFactory, job: Job) -> str:
    """The code that the job failed with, after checking that it did."""
    failed = read_job(sessions, job)
    assert failed.state == JobState.FAILED
    assert failed.error is not None
    return str(failed.error["code"])


def run(workbench: Workbench) -> None:
    workbench.run(queue_name=IO)
    workbench.run(queue_name=GPU)


# --- objects in other buckets --------------------------------------------------------------------------------------


def test_an_object_of_another_bucket_becomes_a_mask(
    api: TestClient, submit_source: Send, archive: Storage, bucket: str, workbench: Workbench, sessions: SessionFactory
) -> None:
    put(archive, "a folder/a.png")
    accepted = submit_source({"s3": f"s3://{bucket}/a folder/a.png"}).json()
    location = f"s3://{bucket}/a folder/a.png"
    assert (accepted["kind"], accepted["source"]) == (
        None, {"filename": "a.png", "size_bytes": None, "location": location, "expires_at": None},
    )  # fmt: skip
    run(workbench)
    done = api.get(accepted["links"]["self"]).json()
    assert (done["state"], done["kind"]) == ("succeeded", "image")
    assert done["source"] == {
        "filename": "a.png", "size_bytes": len(small_image()), "location": location, "expires_at": None,
    }  # fmt: skip
    assert [step.kind for step in read_steps(sessions, read_only(sessions, Job))] == [StepKind.FETCH, StepKind.INFER]
    source = api.get(done["links"]["result"]).json()["source"]
    assert (source["location"], source["width"], source["height"]) == (location, 48, 32)
    assert not {"bucket", "key", "url", "expect"} & set(source)


def test_the_object_of_somebody_else_outlives_the_job(
    api: TestClient,
    submit_source: Send,
    archive: Storage,
    bucket: str,
    workbench: Workbench,
    sessions: SessionFactory,
    housekeeping: Housekeeping,
) -> None:
    put(archive, "a.png")
    job = submit_source({"s3": f"s3://{bucket}/a.png"}).json()
    run(workbench)
    assert api.delete(job["links"]["self"]).status_code == 204
    housekeeping.purge_jobs()
    assert count_rows(sessions, Job) == 0
    assert archive.list_keys("") == ["a.png"]


def test_an_object_that_is_replaced_after_it_was_looked_at_is_not_read(
    submit_source: Send, archive: Storage, bucket: str, workbench: Workbench, sessions: SessionFactory
) -> None:
    put(archive, "a.png")
    submit_source({"s3": f"s3://{bucket}/a.png"})
    workbench.run(queue_name=IO)
    put(archive, "a.png", small_image(width=64))
    workbench.run(queue_name=GPU)
    assert fail(sessions, read_only(sessions, Job)) == "source_changed"


def test_an_object_that_is_not_there_fails_the_job(
    submit_source: Send, archive: Storage, bucket: str, workbench: Workbench, sessions: SessionFactory
) -> None:
    submit_source({"s3": f"s3://{bucket}/none.png"})
    run(workbench)
    assert fail(sessions, read_only(sessions, Job)) == "source_missing"


@pytest.mark.parametrize("url", ["s3://another-bucket/a.png", "s3://{results}/tenants/"])
def test_a_bucket_that_is_not_to_be_read_is_refused(
    submit_source: Send, api: TestClient, settings: Settings, url: str, sessions: SessionFactory
) -> None:
    url = url.format(results=settings.storage.bucket)
    problem(submit_source({"s3": url}), 403, "source_forbidden")
    batch = {"name": "a batch", "mode": "demo", "prefix": url}
    problem(api.post("/v1/batches", json=batch), 403, "source_forbidden")
    assert count_rows(sessions, Job) == 0


@pytest.mark.parametrize(
    ("content", "expect", "state"),
    [
        (small_image(), "image", JobState.RUNNING),
        (small_image(), "recording", JobState.FAILED),
        (b"\x00\x00\x00\x18ftypisom", "recording", JobState.RUNNING),
        (b"\x00\x00\x00\x18ftypisom", "image", JobState.FAILED),
        (b"some words", "recording", JobState.FAILED),
    ],
)
def test_what_is_not_what_was_expected_fails_at_once(
    submit_source: Send, archive: Storage, bucket: str, workbench: Workbench, sessions: SessionFactory,
    content: bytes, expect: JobKind, state: JobState,
) -> None:  # fmt: skip
    put(archive, "a", content)
    submit_source({"s3": f"s3://{bucket}/a"}, expect=expect)
    with workbench.runner(queue_name=IO) as (runner, _):
        runner.run_until_idle()
    job = read_only(sessions, Job)
    if expect == "recording" and state == JobState.RUNNING:
        assert (job.kind, read_steps(sessions, job)[1].kind) == ("recording", StepKind.PROBE)
    elif state == JobState.RUNNING:
        assert (job.kind, job.state) == ("image", JobState.RUNNING)
    else:
        assert fail(sessions, job) == "kind_mismatch"


def test_options_that_are_not_for_the_kind_fail_the_job(
    submit_source: Send, archive: Storage, bucket: str, workbench: Workbench, sessions: SessionFactory
) -> None:
    put(archive, "a.png")
    submit_source({"s3": f"s3://{bucket}/a.png"}, options={"frames": {"every": 2}})
    run(workbench)
    assert fail(sessions, read_only(sessions, Job)) == "kind_mismatch"


# --- batches of a prefix -------------------------------------------------------------------------------------------


def test_every_object_under_a_prefix_becomes_a_job(
    api: TestClient, archive: Storage, bucket: str, workbench: Workbench, broker: Broker, sessions: SessionFactory
) -> None:
    for key in ("films/a.png", "films/more/b.png", "other/c.png"):
        put(archive, key)
    put(archive, "films/nothing.png", b"")
    batch = api.post("/v1/batches", json={"name": "films", "mode": "demo", "prefix": f"s3://{bucket}/films/"}).json()
    assert batch["jobs"]["total"] == 2
    wait_until(lambda: len(broker.steps(IO)) == 2)
    jobs = api.get(batch["links"]["jobs"]).json()["items"]
    assert sorted(job["source"]["location"] for job in jobs) == [
        f"s3://{bucket}/films/a.png", f"s3://{bucket}/films/more/b.png",
    ]  # fmt: skip
    run(workbench)
    done = api.get(batch["links"]["self"]).json()
    assert (done["state"], done["jobs"]["succeeded"]) == ("completed", 2)
    assert read_only(sessions, Batch).jobs_left == 0


def test_how_long_a_batch_takes_is_not_told_before_its_sources_were_looked_at(
    api: TestClient, archive: Storage, bucket: str, workbench: Workbench
) -> None:
    put(archive, "a.png")
    batch = api.post("/v1/batches", json={"name": "films", "mode": "demo", "prefix": f"s3://{bucket}/"}).json()
    assert batch["progress"]["total"] is None
    workbench.run(queue_name=IO)
    assert api.get(batch["links"]["self"]).json()["progress"]["total"] == 1


def test_a_prefix_with_nothing_under_it_is_refused(api: TestClient, archive: Storage, bucket: str) -> None:
    batch = {"name": "films", "mode": "demo", "prefix": f"s3://{bucket}/films/"}
    answer = problem(api.post("/v1/batches", json=batch), 422, "invalid_request")
    assert "there is nothing under" in answer["detail"]


def test_a_bucket_that_does_not_exist_is_a_missing_source(api: TestClient, bucket: str) -> None:
    batch = {"name": "films", "mode": "demo", "prefix": f"s3://{bucket}/films/"}
    problem(api.post("/v1/batches", json=batch), 404, "source_missing")


def test_the_same_object_twice_in_a_batch_is_refused(api: TestClient, bucket: str) -> None:
    items = [{"source": {"s3": f"s3://{bucket}/a.png"}}] * 2
    answer = api.post("/v1/batches", json={"name": "films", "mode": "demo", "items": items})
    [wrong] = problem(answer, 422, "invalid_request")["errors"]
    assert (wrong["field"], wrong["rule"]) == ("body.items.1.source.s3", "duplicate")


# --- files at a URL ------------------------------------------------------------------------------------------------


def test_a_file_at_a_url_becomes_a_mask_and_its_copy_goes_with_the_job(
    api: TestClient, submit_source: Send, server: ScriptedService, workbench: Workbench, sessions: SessionFactory
) -> None:
    server.script(say(200, small_image()))
    job = submit_source({"url": f"{server.url}/films/a.png?signature=secret"}).json()
    assert job["source"]["location"] == f"{server.url}/films/a.png"
    run(workbench)
    done = api.get(job["links"]["self"]).json()
    assert (done["state"], done["kind"], done["source"]["size_bytes"]) == ("succeeded", "image", len(small_image()))
    assert [each.path for each in server.asked] == ["/films/a.png?signature=secret"]
    row = read_only(sessions, Job)
    assert row.source["key"].startswith(job_prefix(row.tenant_id, row.id))
    assert "secret" not in str(row.source)
    assert workbench.storage.read(row.source["key"], limit_bytes=10**6) == small_image()


def test_a_file_larger_than_a_part_arrives_whole(
    submit_source: Send, server: ScriptedService, workbench: Workbench, sessions: SessionFactory, settings: Settings
) -> None:
    content = small_image() + bytes(20 * 2**20)
    server.script(say(200, content))
    submit_source({"url": f"{server.url}/a.png"})
    replace(workbench, settings=changed(settings, "fetch", source_bytes=10**9)).run(queue_name=IO)
    row = read_only(sessions, Job)
    assert workbench.storage.read(row.source["key"], limit_bytes=10**8) == content


def test_http_is_not_fetched_unless_the_stack_is_a_private_one(
    settings: Settings, storage: Storage, api_key: str
) -> None:
    with serve(settings.model_copy(update={"fetch": Fetch()}), key=api_key) as api:
        answer = api.post("/v1/jobs", json={"source": {"url": "http://a.example/a.png"}, "mode": "demo"})
    problem(answer, 403, "source_forbidden")


def test_an_address_that_is_not_public_is_not_called(
    submit_source: Send, server: ScriptedService, workbench: Workbench, sessions: SessionFactory, settings: Settings
) -> None:
    submit_source({"url": f"https://127.0.0.1:{server.url.rpartition(':')[2]}/a.png"})
    replace(workbench, settings=settings.model_copy(update={"fetch": Fetch()})).run(queue_name=IO)
    assert fail(sessions, read_only(sessions, Job)) == "address_refused"
    assert server.asked == []


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "source_missing"), (410, "source_missing"), (403, "source_refused"), (204, "source_refused")],
)
def test_a_server_that_refuses_fails_the_job(
    submit_source: Send, server: ScriptedService, workbench: Workbench, sessions: SessionFactory, status: int, code: str
) -> None:
    server.script(say(status, b""))
    submit_source({"url": f"{server.url}/a.png"})
    workbench.run(queue_name=IO)
    assert fail(sessions, read_only(sessions, Job)) == code


@pytest.mark.parametrize("trouble", [say(503, b""), say(429, b""), hang_up])
def test_a_server_in_trouble_is_asked_again_later(
    submit_source: Send, server: ScriptedService, workbench: Workbench, sessions: SessionFactory, trouble: Answer
) -> None:
    server.script(trouble, say(200, small_image()))
    submit_source({"url": f"{server.url}/a.png"})
    workbench.run(queue_name=IO)
    job = read_only(sessions, Job)
    [step] = read_steps(sessions, job)
    assert step.error is not None
    assert (step.error["code"], step.failures, job.state) == ("source_unreachable", 1, JobState.RUNNING)
    with sessions.begin() as session:
        make_late(session, "steps", "run_after")
    run(workbench)
    assert read_job(sessions, job).state == JobState.SUCCEEDED


def test_what_a_killed_attempt_had_stored_goes_with_the_next_one(
    submit_source: Send, server: ScriptedService, workbench: Workbench, sessions: SessionFactory,
    claim: Callable[..., ClaimedStep | None],
) -> None:  # fmt: skip
    submit_source({"url": f"{server.url}/a.png"})
    killed = claim(queue_name=IO)
    assert killed is not None
    storage, prefix = workbench.storage, prefix_of(killed)
    storage.put(f"{prefix}source", CONTENT, content_type="application/octet-stream")
    begun = storage.multipart.begin(f"{prefix}source", content_type="application/octet-stream")
    take_back(sessions, killed.job)
    server.script(say(200, small_image()))
    workbench.run(queue_name=IO)
    row = read_only(sessions, Job)
    assert storage.list_keys(prefix) == []
    with pytest.raises(SourceMissing):
        storage.multipart.list_parts(f"{prefix}source", begun)
    assert storage.read(row.source["key"], limit_bytes=10**6) == small_image()


def test_a_cancel_ends_a_download_and_nothing_of_it_stays(
    api: TestClient, submit_source: Send, server: ScriptedService, workbench: Workbench, sessions: SessionFactory
) -> None:
    job = submit_source({"url": f"{server.url}/a.png"}).json()
    hung_up = threading.Event()

    def cancel_meanwhile(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", str(len(CONTENT)))
        handler.end_headers()
        assert api.post(job["links"]["cancel"]).status_code == 202
        with suppress(OSError):
            for start in range(0, len(CONTENT), 4096):  # far more time than a heartbeat needs
                handler.wfile.write(CONTENT[start : start + 4096])
                time.sleep(0.01)
            return
        hung_up.set()

    server.script(cancel_meanwhile)
    workbench.run(queue_name=IO)
    row = read_only(sessions, Job)
    assert row.state == JobState.CANCELED
    assert hung_up.wait(WAIT_SECONDS)
    assert nothing_stored(workbench.storage, row)
