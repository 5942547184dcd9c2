"""The API where there is no room left: in the queue, or on its own disk. It says so before it takes anything."""

import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import pytest
from starlette.testclient import TestClient

from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Job
from shared.storage import Storage
from tests.integration.conftest import Submit, changed, count_rows, problem, serve, small_image

LIMIT = 2
SPOOLED_BYTES = 2 * 2**20  # more than is kept in memory


@pytest.fixture
def narrow(settings: Settings, storage: Storage, api_key: str) -> Iterator[TestClient]:
    """An API whose queue has room for two jobs."""
    with serve(changed(settings, "jobs", queued_limit=LIMIT), key=api_key) as client:
        yield client


def submit_to(api: TestClient, *, key: str | None = None) -> httpx2.Response:
    headers = {"Idempotency-Key": key} if key else {}
    return api.post("/v1/jobs", data={"mode": "demo"}, files={"file": ("a.png", small_image())}, headers=headers)


def test_a_full_queue_takes_no_more_and_says_when_to_come_back(narrow: TestClient, sessions: SessionFactory) -> None:
    assert [submit_to(narrow).status_code for _ in range(LIMIT)] == [202] * LIMIT
    answer = submit_to(narrow)
    problem(answer, 429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    assert count_rows(sessions, Job) == LIMIT


def test_jobs_that_others_queued_count(narrow: TestClient, submit: Submit) -> None:
    for _ in range(LIMIT):
        submit()
    problem(submit_to(narrow), 429, "queue_full")


def test_a_request_that_was_answered_before_is_answered_again_by_a_full_queue(narrow: TestClient) -> None:
    first = submit_to(narrow, key="k")
    submit_to(narrow)
    again = submit_to(narrow, key="k")
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])


def test_a_key_that_a_full_queue_refused_stays_free(narrow: TestClient, api: TestClient, submit: Submit) -> None:
    for _ in range(LIMIT):
        submit()
    problem(submit_to(narrow, key="k"), 429, "queue_full")
    assert submit_to(api, key="k").status_code == 202


def test_a_batch_needs_room_for_all_its_items(
    narrow: TestClient, put_upload: Callable[..., str], sessions: SessionFactory
) -> None:
    items = [{"source": {"upload_id": put_upload()}} for _ in range(LIMIT + 1)]
    answer = narrow.post("/v1/batches", json={"name": "a batch", "mode": "demo", "items": items})
    problem(answer, 429, "queue_full")
    assert count_rows(sessions, Job) == 0
    answer = narrow.post("/v1/batches", json={"name": "a batch", "mode": "demo", "items": items[:LIMIT]})
    assert answer.status_code == 202


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_for_which_the_api_has_no_disk_is_refused_with_the_reason(
    api: TestClient, sessions: SessionFactory
) -> None:
    sent = {"file": ("a.png", small_image() + bytes(SPOOLED_BYTES))}
    assert tempfile.gettempdir(), "looked up before, as that tries to write"
    with full_disk():
        answer = api.post("/v1/jobs", data={"mode": "demo"}, files=sent)
    problem(answer, 507, "disk_full")
    assert int(answer.headers["retry-after"]) >= 1
    assert count_rows(sessions, Job) == 0
