"""The list of jobs: newest first, filtered, in pages that miss nothing and repeat nothing."""

from base64 import urlsafe_b64encode
from itertools import chain
from typing import Any

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from shared.db import SessionFactory
from shared.models import Batch, JobState, Tenant
from tests.integration.conftest import MakeJob, problem


def listed(api: TestClient, **wanted: Any) -> list[str]:
    answer = api.get("/v1/jobs", params=wanted)
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["items"]]


def walk(api: TestClient, *, limit: int) -> list[list[str]]:
    """All pages, each the ids of its jobs."""
    pages, cursor = [], None
    while True:
        page = api.get("/v1/jobs", params={"limit": limit, **({"cursor": cursor} if cursor else {})}).json()
        pages.append([job["id"] for job in page["items"]])
        cursor = page["next_cursor"]
        if cursor is None:
            return pages


def test_nothing_is_an_empty_page(api: TestClient) -> None:
    assert api.get("/v1/jobs").json() == {"items": [], "next_cursor": None}


def test_the_newest_job_comes_first(api: TestClient, make_job: MakeJob) -> None:
    made = [str(make_job().id) for _ in range(3)]
    assert listed(api) == made[::-1]


def test_pages_miss_and_repeat_nothing_when_jobs_are_of_the_same_moment(
    api: TestClient, sessions: SessionFactory, make_job: MakeJob
) -> None:
    made = [str(make_job().id) for _ in range(7)]
    with sessions.begin() as session:
        session.execute(text("UPDATE jobs SET created_at = '2026-01-31T12:00:00.123456Z'"))
    pages = walk(api, limit=2)
    assert [len(page) for page in pages] == [2, 2, 2, 1]
    assert list(chain.from_iterable(pages)) == sorted(made, reverse=True)


def test_the_last_page_may_be_full(api: TestClient, make_job: MakeJob) -> None:
    for _ in range(4):
        make_job()
    assert [len(page) for page in walk(api, limit=2)] == [2, 2]


def test_a_job_submitted_meanwhile_does_not_shift_the_pages(api: TestClient, make_job: MakeJob) -> None:
    made = [str(make_job().id) for _ in range(4)]
    first = api.get("/v1/jobs", params={"limit": 2}).json()
    make_job()
    assert listed(api, cursor=first["next_cursor"]) == made[1::-1]


def test_a_filter_holds_on_every_page(api: TestClient, make_job: MakeJob) -> None:
    wanted = {str(make_job(mode="sota").id) for _ in range(3)}
    for _ in range(3):
        make_job(mode="fast")
    first = api.get("/v1/jobs", params={"mode": "sota", "limit": 2}).json()
    rest = listed(api, mode="sota", limit=2, cursor=first["next_cursor"])
    assert {job["id"] for job in first["items"]} | set(rest) == wanted


def test_jobs_are_found_by_their_state(api: TestClient, job_in: MakeJob) -> None:
    made = {
        state: str(job_in(state).id) for state in reversed(JobState)
    }  # the queued one last, for it would be claimed
    for state, wanted in made.items():
        assert listed(api, state=state) == [wanted]


def test_jobs_are_found_by_mode_kind_and_batch(
    api: TestClient, sessions: SessionFactory, make_job: MakeJob, tenant: Tenant
) -> None:
    with sessions.begin() as session:
        batch = Batch(tenant_id=tenant.id, name="a batch", mode="demo", options={})
        session.add(batch)
    make_job()
    for name, values in (
        ("mode", {"mode": "sota"}), ("kind", {"kind": "recording"}), ("batch_id", {"batch_id": batch.id})
    ):  # fmt: skip
        wanted = str(make_job(**values).id)
        assert listed(api, **values) == [wanted], f"by {name}"


def test_jobs_are_found_by_their_age(api: TestClient, make_job: MakeJob) -> None:
    older, newer = make_job(), make_job()
    assert listed(api, created_after=older.created_at.isoformat()) == [str(newer.id)]


def test_other_tenants_jobs_are_not_listed(api: TestClient, make_job: MakeJob, foreign: dict[str, str]) -> None:
    make_job()
    assert api.get("/v1/jobs", headers=foreign).json()["items"] == []


def test_a_list_that_cannot_be_meant_is_refused(api: TestClient, subtests: pytest.Subtests) -> None:
    for wanted in (
        {"limit": 0},
        {"limit": -1},
        {"limit": 201},
        {"limit": 10**9},
        {"limit": "many"},
        {"state": "done"},
        {"mode": "best"},
        {"kind": "film"},
        {"batch_id": "../1"},
        {"created_after": "yesterday"},
        {"created_after": "2026-01-31T12:00:00"},
    ):
        with subtests.test(wanted=wanted):
            problem(api.get("/v1/jobs", params=wanted), 422, "invalid_request")


def test_a_cursor_we_did_not_give_out_is_refused(api: TestClient, subtests: pytest.Subtests) -> None:
    forged = (
        b"\xff\xfe",
        b"2026-01-31T12:00:00Z",
        b"2026-01-31 00000000-0000-7000-8000-000000000000",
        b"2026-01-31T12:00:00+00:00 not-an-id",
        b"99999-01-31T12:00:00Z 00000000-0000-7000-8000-000000000000",
        b"2026-01-31T12:00:00Z' 00000000-0000-7000-8000-000000000000",
    )
    for cursor in ("", "garbage", "ä", "=", "x" * 1000, *(urlsafe_b64encode(each).decode() for each in forged)):
        with subtests.test(cursor=cursor):
            problem(api.get("/v1/jobs", params={"cursor": cursor}), 422, "invalid_request")
