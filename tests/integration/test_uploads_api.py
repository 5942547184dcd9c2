"""Uploads: announced here, sent straight to the storage by a signed link, checked before they count."""

import uuid
from typing import Any

import httpx2
import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from shared.config import Api, Settings
from shared.db import SessionFactory
from shared.models import JobState, Upload
from shared.storage import Storage
from tests.integration.conftest import make_late, problem, read_only, serve, small_image
from tests.integration.workbench import Workbench

IMAGE = small_image()


def announce(api: TestClient, **changed: Any) -> dict[str, Any]:
    wanted = {"filename": "a.png", "size": len(IMAGE), "content_type": "image/png", **changed}
    answer = api.post("/v1/uploads", json=wanted)
    assert answer.status_code == 201, answer.text
    upload: dict[str, Any] = answer.json()
    return upload


def send(upload: dict[str, Any], body: bytes = IMAGE) -> httpx2.Response:
    return httpx2.put(upload["url"], content=body, headers=upload["headers"])


def submit(api: TestClient, upload: dict[str, Any]) -> httpx2.Response:
    return api.post("/v1/jobs", json={"mode": "demo", "source": {"upload_id": upload["id"]}})


@pytest.fixture
def upload(api: TestClient) -> dict[str, Any]:
    """Announced, and nothing more."""
    return announce(api)


@pytest.fixture
def sent_upload(upload: dict[str, Any]) -> dict[str, Any]:
    assert send(upload).status_code == 200
    return upload


def test_an_announced_upload_says_where_its_bytes_go(api: TestClient) -> None:
    answer = api.post("/v1/uploads", json={"filename": "ä.png", "size": 5, "content_type": "image/png"})
    upload = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/uploads/{upload['id']}"
    assert (upload["filename"], upload["size"], upload["content_type"]) == ("ä.png", 5, "image/png")
    assert upload["completed"] is False
    assert upload["url"].startswith("http://127.0.0.1:")
    assert upload["headers"] == {"Content-Type": "image/png"}
    assert upload["expires_at"] > upload["created_at"]


def test_bytes_sent_by_the_link_make_the_upload_complete(
    api: TestClient, sent_upload: dict[str, Any], storage: Storage, sessions: SessionFactory
) -> None:
    answer = api.post(f"/v1/uploads/{sent_upload['id']}/complete")
    assert answer.status_code == 200
    assert (answer.json()["completed"], answer.json()["url"], answer.json()["headers"]) == (True, None, {})
    assert storage.read(read_only(sessions, Upload).storage_key, limit_bytes=10**6) == IMAGE


def test_a_complete_upload_becomes_a_job_that_runs(
    api: TestClient, sent_upload: dict[str, Any], workbench: Workbench
) -> None:
    api.post(f"/v1/uploads/{sent_upload['id']}/complete")
    answer = submit(api, sent_upload)
    assert answer.status_code == 202
    workbench.run()
    assert api.get(answer.headers["location"]).json()["state"] == JobState.SUCCEEDED


def test_submitting_completes_an_upload_whose_bytes_have_arrived(api: TestClient, sent_upload: dict[str, Any]) -> None:
    assert submit(api, sent_upload).status_code == 202
    assert api.get(f"/v1/uploads/{sent_upload['id']}").json()["completed"] is True


def test_one_upload_serves_many_jobs(api: TestClient, sent_upload: dict[str, Any]) -> None:
    first, second = submit(api, sent_upload).json(), submit(api, sent_upload).json()
    assert first["id"] != second["id"]


def test_completing_twice_is_the_same_as_once(
    api: TestClient, sent_upload: dict[str, Any], sessions: SessionFactory
) -> None:
    complete = f"/v1/uploads/{sent_upload['id']}/complete"
    first = api.post(complete, json={"parts": []})
    row = read_only(sessions, Upload)
    assert first.json() == api.post(complete).json()
    again = read_only(sessions, Upload)
    assert (again.etag, again.completed_at, again.expires_at) == (row.etag, row.completed_at, row.expires_at)


def test_an_upload_whose_bytes_have_not_arrived_is_incomplete(api: TestClient, upload: dict[str, Any]) -> None:
    problem(api.post(f"/v1/uploads/{upload['id']}/complete"), 409, "upload_incomplete")
    problem(submit(api, upload), 409, "upload_incomplete")
    assert api.get(f"/v1/uploads/{upload['id']}").json()["url"]


@pytest.mark.parametrize("body", [IMAGE + b"more", IMAGE[:-1], b""])
def test_bytes_of_another_length_are_refused_by_the_storage(
    api: TestClient, upload: dict[str, Any], storage: Storage, body: bytes
) -> None:
    """The length is part of what is signed."""
    assert send(upload, body).status_code == 403
    assert storage.list_keys("") == []
    problem(submit(api, upload), 409, "upload_incomplete")


def test_bytes_of_another_length_do_not_count_where_a_storage_took_them(
    api: TestClient, upload: dict[str, Any], storage: Storage, sessions: SessionFactory
) -> None:
    storage.put(read_only(sessions, Upload).storage_key, IMAGE + b"more", content_type="image/png")
    problem(api.post(f"/v1/uploads/{upload['id']}/complete"), 409, "upload_incomplete")
    problem(submit(api, upload), 409, "upload_incomplete")


def test_a_link_is_good_for_its_own_object_alone(api: TestClient, upload: dict[str, Any], storage: Storage) -> None:
    other = announce(api)
    moved = upload["url"].replace(upload["id"], other["id"])
    assert httpx2.put(moved, content=IMAGE, headers=upload["headers"]).status_code == 403
    assert storage.list_keys("") == []


def test_a_single_upload_has_no_parts(api: TestClient, sent_upload: dict[str, Any]) -> None:
    parts = {"parts": [{"number": 1, "etag": "x"}]}
    problem(api.post(f"/v1/uploads/{sent_upload['id']}/complete", json=parts), 422, "invalid_request")


def test_an_expired_upload_is_gone(api: TestClient, upload: dict[str, Any], sessions: SessionFactory) -> None:
    with sessions.begin() as session:
        make_late(session, "uploads", "expires_at")
    problem(api.get(f"/v1/uploads/{upload['id']}"), 404, "not_found")
    problem(api.post(f"/v1/uploads/{upload['id']}/complete"), 404, "not_found")
    problem(submit(api, upload), 404, "not_found")


def test_a_complete_upload_is_kept_as_long_as_a_job_would_be(
    api: TestClient, sent_upload: dict[str, Any], settings: Settings, sessions: SessionFactory
) -> None:
    kept = api.post(f"/v1/uploads/{sent_upload['id']}/complete").json()
    assert kept["expires_at"] > sent_upload["expires_at"]
    with sessions() as session:
        seconds = session.scalar(text("SELECT extract(epoch FROM expires_at - completed_at) FROM uploads"))
    assert seconds == settings.jobs.keep_seconds


def test_a_deleted_upload_is_gone_while_its_job_still_runs(
    api: TestClient, sent_upload: dict[str, Any], workbench: Workbench
) -> None:
    job = submit(api, sent_upload).json()
    assert api.delete(f"/v1/uploads/{sent_upload['id']}").status_code == 204
    problem(api.get(f"/v1/uploads/{sent_upload['id']}"), 404, "not_found")
    problem(submit(api, sent_upload), 404, "not_found")
    workbench.run()
    assert api.get(job["links"]["self"]).json()["state"] == JobState.SUCCEEDED


def test_an_upload_larger_than_a_file_may_be_is_refused(settings: Settings, storage: Storage, api_key: str) -> None:
    limits = Api(source_bytes=1000)
    with serve(settings.model_copy(update={"api": limits}), key=api_key) as api:
        assert announce(api, size=1000)
        wanted = {"filename": "a.png", "size": 1001}
        problem(api.post("/v1/uploads", json=wanted), 413, "too_large")
        problem(api.post("/v1/uploads", json={**wanted, "size": 2**63}), 413, "too_large")


def test_an_upload_that_cannot_be_meant_is_refused(api: TestClient, subtests: pytest.Subtests) -> None:
    wrong: list[dict[str, Any]] = [
        {"size": 0},
        {"size": -1},
        {"size": True},
        {"size": "5"},
        {"size": 5.0},
        {"size": None},
        {"filename": ""},
        {"filename": "x" * 256},
        {"filename": "a\x00b"},
        {"filename": 1},
        {"content_type": ""},
        {"content_type": "png"},
        {"content_type": "image/png; charset=utf-7"},
        {"content_type": "image/png\r\nx-injected: 1"},
        {"content_type": "bild/größe"},
        {"content_type": "a/" + "x" * 255},
        {"tenant_id": str(uuid.uuid4())},
    ]
    for changed in wrong:
        with subtests.test(changed=changed):
            wanted = {"filename": "a.png", "size": 5, **changed}
            problem(api.post("/v1/uploads", json=wanted), 422, "invalid_request")
