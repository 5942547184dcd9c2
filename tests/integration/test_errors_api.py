"""What every refusal has in common, whatever was asked."""

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from shared.config import Settings
from shared.db import SessionFactory
from shared.models import create_id
from tests.integration.conftest import MakeJob, authorize, problem, serve


@pytest.mark.parametrize("path", ["/v1/nothing", "/v2/jobs", "/favicon.ico"])
def test_a_path_that_does_not_exist_is_not_found(api: TestClient, path: str) -> None:
    problem(api.get(path), 404, "not_found")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "TRACE", "OPTIONS"])
def test_a_method_that_does_not_exist_is_refused(api: TestClient, method: str) -> None:
    answer = api.request(method, "/v1/jobs")
    problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"]


def test_a_method_is_what_the_request_line_says(api: TestClient, make_job: MakeJob) -> None:
    job = make_job()
    answer = api.post(f"/v1/jobs/{job.id}", headers={"X-HTTP-Method-Override": "DELETE"})
    problem(answer, 405, "method_not_allowed")


def test_an_id_that_is_none_is_refused(api: TestClient, subtests: pytest.Subtests) -> None:
    for job_id in ("1", "a" * 36, "..%2F..%2Fetc", str(create_id())[:-1], "%00", "null", "0x1"):
        with subtests.test(job_id=job_id):
            answer = api.get(f"/v1/jobs/{job_id}")
            assert answer.status_code in (404, 422)
            problem(answer, answer.status_code, "not_found" if answer.status_code == 404 else "invalid_request")


def test_an_unknown_id_is_not_found(api: TestClient) -> None:
    problem(api.get(f"/v1/jobs/{create_id()}"), 404, "not_found")
    problem(api.get(f"/v1/uploads/{create_id()}"), 404, "not_found")


def test_what_fails_on_our_side_is_our_error_and_tells_no_secrets(
    settings: Settings, sessions: SessionFactory, api_key: str, make_job: MakeJob
) -> None:
    job = make_job()
    with sessions.begin() as session:
        session.execute(text("""UPDATE jobs SET options = '{"written": "by hand"}'"""))
    with serve(settings, key=api_key) as client:
        client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]  # noqa: SLF001
        answer = client.get(f"/v1/jobs/{job.id}")
    refused = problem(answer, 500, "internal_error")
    assert "written" not in str(refused)


def test_links_follow_no_host_header(api: TestClient, make_job: MakeJob) -> None:
    job = api.get(f"/v1/jobs/{make_job().id}", headers={"Host": "elsewhere.example"}).json()
    assert all(link.startswith("/v1/jobs/") for link in job["links"].values())


@pytest.mark.parametrize("key", ["", "not a key"])
def test_health_needs_no_key(api: TestClient, key: str) -> None:
    assert api.get("/healthz", headers=authorize(key)).json() == {"status": "ok"}
