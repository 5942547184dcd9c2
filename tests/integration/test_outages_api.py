"""The API while the servers behind it are away: it says so, and what does not need them goes on."""

import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2
import pytest
from sqlalchemy import make_url, text
from starlette.testclient import TestClient

from shared.broker import GPU, Hints
from shared.config import Settings
from shared.db import SessionFactory
from shared.models import Job, create_id
from shared.storage import Storage
from tests.integration.conftest import MakeJob, Submit, changed, count_rows, problem, serve, small_image, wait_until
from tests.integration.workbench import Workbench


def submit_to(api: TestClient, **headers: str) -> httpx2.Response:
    sent = {"file": ("a.png", small_image())}
    return api.post("/v1/jobs", data={"mode": "demo"}, files=sent, headers=headers)


@pytest.fixture(params=["down", "silent"])
def api_without_broker(
    request: pytest.FixtureRequest,
    settings: Settings,
    storage: Storage,
    api_key: str,
    closed_port: int,
    silent_port: int,
) -> Iterator[TestClient]:
    """Its broker refuses connections, or takes them and never answers."""
    port = closed_port if request.param == "down" else silent_port
    broken = changed(settings, "broker", url=f"redis://127.0.0.1:{port}/0", socket_timeout_seconds=60)
    with serve(broken, key=api_key) as client:
        yield client


@pytest.fixture
def api_without_database(settings: Settings, storage: Storage, api_key: str, closed_port: int) -> Iterator[TestClient]:
    url = make_url(settings.database.url).set(port=closed_port).render_as_string(hide_password=False)
    with serve(changed(settings, "database", url=url), key=api_key) as client:
        yield client


@pytest.fixture
def api_without_storage(settings: Settings, api_key: str, closed_port: int) -> Iterator[TestClient]:
    with serve(changed(settings, "storage", endpoint_url=f"http://127.0.0.1:{closed_port}"), key=api_key) as client:
        yield client


def test_it_is_ready_when_all_its_servers_are(api: TestClient) -> None:
    answer = api.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    assert answer.json()["checks"] == {"database": "ok", "storage": "ok", "broker": "ok"}


# --- without the broker --------------------------------------------------------------------------------------------


def test_a_job_is_accepted_within_two_seconds_without_the_broker(
    api_without_broker: TestClient, sessions: SessionFactory
) -> None:
    began = time.monotonic()
    answers = [submit_to(api_without_broker) for _ in range(3)]
    assert time.monotonic() - began < 3 * 2
    assert [answer.status_code for answer in answers] == [202] * 3
    assert count_rows(sessions, Job) == 3


def test_a_job_submitted_without_the_broker_runs_all_the_same(
    api_without_broker: TestClient, workbench: Workbench
) -> None:
    job = submit_to(api_without_broker).json()
    workbench.run()
    assert api_without_broker.get(job["links"]["self"]).json()["state"] == "succeeded"


def test_without_the_broker_it_is_degraded_and_stays_in_service(api_without_broker: TestClient) -> None:
    began = time.monotonic()
    answer = api_without_broker.get("/readyz")
    assert time.monotonic() - began < 30, "a prober gave up long ago"
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["checks"]["broker"].startswith("cannot be reached")
    assert api_without_broker.get("/healthz").status_code == 200


def test_hints_that_cannot_be_sent_are_counted_and_forgotten(settings: Settings, closed_port: int) -> None:
    hints = Hints(settings.broker.model_copy(update={"url": f"redis://127.0.0.1:{closed_port}/0"}))
    hints.wake(GPU, create_id())
    hints.wake_sender()
    wait_until(lambda: hints.unsent == 2)
    hints.close()


# --- without the database ------------------------------------------------------------------------------------------


def test_without_the_database_every_route_says_when_to_come_back(
    api: TestClient, api_without_database: TestClient, subtests: pytest.Subtests
) -> None:
    for path, operations in api.get("/openapi.json").json()["paths"].items():
        for method in operations if path.startswith("/v1/") else ():
            with subtests.test(method=method, path=path):
                answer = api_without_database.request(method, path)
                problem(answer, 503, "database_unavailable")
                assert int(answer.headers["retry-after"]) >= 1


def test_without_the_database_it_is_taken_out_of_service(api_without_database: TestClient) -> None:
    answer = api_without_database.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert answer.json()["checks"]["database"].startswith("cannot be reached")
    assert api_without_database.get("/healthz").status_code == 200


def test_connections_that_were_cut_are_replaced(api: TestClient, submit: Submit, sessions: SessionFactory) -> None:
    submit()
    with sessions() as session:
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        session.execute(text(f"{cut} AND pid <> pg_backend_pid()"))
    assert submit().status_code == 202


def test_a_row_that_somebody_holds_is_not_waited_for_without_end(
    settings: Settings, sessions: SessionFactory, api_key: str, make_job: MakeJob
) -> None:
    job = make_job()
    with ExitStack() as stack:
        api = stack.enter_context(serve(changed(settings, "database", lock_timeout_seconds=0.2), key=api_key))
        session = stack.enter_context(sessions.begin())
        session.execute(text("SELECT 1 FROM steps FOR UPDATE"))
        problem(api.post(f"/v1/jobs/{job.id}/cancel"), 503, "database_unavailable")
    assert count_rows(sessions, Job) == 1


# --- without the storage -------------------------------------------------------------------------------------------


def test_without_the_storage_a_file_is_refused_and_its_key_stays_free(
    api_without_storage: TestClient, api: TestClient, sessions: SessionFactory
) -> None:
    key = {"Idempotency-Key": "k"}
    answer = submit_to(api_without_storage, **key)
    problem(answer, 503, "storage_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert count_rows(sessions, Job) == 0
    assert submit_to(api, **key).status_code == 202


def test_without_the_storage_jobs_are_still_told_and_canceled(
    api_without_storage: TestClient, make_job: MakeJob
) -> None:
    job = make_job()
    assert api_without_storage.get(f"/v1/jobs/{job.id}").status_code == 200
    assert api_without_storage.post(f"/v1/jobs/{job.id}/cancel").status_code == 202


def test_without_the_storage_it_is_taken_out_of_service(api_without_storage: TestClient) -> None:
    answer = api_without_storage.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert "cannot be reached" in answer.json()["checks"]["storage"]
