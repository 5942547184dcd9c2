"""Idempotency-Key: the same key and body give the same job, however often and however broken the line."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, func, select, text
from starlette.testclient import TestClient

from api import idempotency
from api.idempotency import Hold
from shared.db import SessionFactory
from shared.errors import IdempotencyConflict
from shared.models import IdempotencyKey, Job, Tenant, create_id
from tests.integration.commits import commit, watched_commits
from tests.integration.conftest import Submit, count_rows, make_late, problem, read_only, small_image

KEY = {"Idempotency-Key": '"a key"'.replace(" ", "-")}


def put_in_flight(sessions: SessionFactory, *, locked_until: str) -> None:
    """What the table holds while the one request with a key is between taking it and its answer."""
    with sessions.begin() as session:
        session.execute(text(f"UPDATE idempotency_keys SET job_id = NULL, locked_until = {locked_until}"))  # noqa: S608


def test_the_same_request_again_is_answered_with_the_same_job(submit: Submit, sessions: SessionFactory) -> None:
    first, second = submit(headers=KEY), submit(headers=KEY)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    assert first.headers["location"] == second.headers["location"]
    assert count_rows(sessions, Job) == 1


def test_the_order_of_fields_and_of_metadata_makes_no_other_request(api: TestClient, sessions: SessionFactory) -> None:
    sent = {"file": ("a.png", small_image())}
    for form in (
        {"mode": "demo", "metadata": '{"a": 1, "b": 2}', "priority": "1"},
        {"priority": " 1", "metadata": '{"b":2,"a":1}', "mode": "demo"},
    ):
        assert api.post("/v1/jobs", data=form, files=sent, headers=KEY).status_code == 202
    assert count_rows(sessions, Job) == 1


def test_a_key_is_the_same_with_and_without_quotes(submit: Submit) -> None:
    quoted, bare = submit(headers={"Idempotency-Key": '"k1"'}), submit(headers={"Idempotency-Key": "k1"})
    assert quoted.json()["id"] == bare.json()["id"]


def test_requests_without_a_key_are_different_jobs(submit: Submit) -> None:
    assert submit().json()["id"] != submit().json()["id"]


def test_another_request_with_the_same_key_is_refused(
    submit: Submit, sessions: SessionFactory, subtests: pytest.Subtests
) -> None:
    submit(headers=KEY)
    others: list[dict[str, Any]] = [
        {"mode": "fast"},
        {"priority": 1},
        {"metadata": {"a": 1}},
        {"options": {"input_size": 64}},
        {"webhook_url": "https://receiver.example"},
        {"file": small_image(width=49)},
    ]
    for changed in others:
        with subtests.test(changed=list(changed)):
            problem(submit(headers=KEY, **changed), 422, "idempotency_mismatch")
    assert count_rows(sessions, Job) == 1


def test_a_key_belongs_to_its_tenant(submit: Submit, foreign: dict[str, str]) -> None:
    assert submit(headers=KEY).json()["id"] != submit(headers=KEY | foreign).json()["id"]


def test_a_request_whose_twin_is_in_flight_is_told_when_to_come_back(submit: Submit, sessions: SessionFactory) -> None:
    submit(headers=KEY)
    put_in_flight(sessions, locked_until="now() + interval '1 minute'")
    answer = submit(headers=KEY)
    problem(answer, 409, "idempotency_in_flight")
    assert int(answer.headers["retry-after"]) >= 1


def test_twins_that_come_together_make_one_job(submit: Submit, sessions: SessionFactory) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers: list[httpx2.Response] = list(pool.map(lambda _: submit(headers=KEY), range(6)))
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 202}) == 1
    assert count_rows(sessions, Job) == 1


def test_a_key_whose_request_died_is_taken_over(submit: Submit, sessions: SessionFactory) -> None:
    dead = submit(headers=KEY)
    put_in_flight(sessions, locked_until="now() - interval '1 second'")
    second = submit(headers=KEY)
    assert second.status_code == 202
    assert second.json()["id"] != dead.json()["id"]
    assert submit(headers=KEY).json()["id"] == second.json()["id"]


def test_a_request_that_was_only_slow_accepts_nothing_once_it_was_taken_for_dead(
    sessions: SessionFactory, tenant: Tenant
) -> None:
    def take() -> Hold:
        with sessions.begin() as session:
            taken = idempotency.take(
                session, tenant.id, "k", request_sha256=b"x", lock_seconds=60, keep_seconds=60
            )  # fmt: skip
            assert isinstance(taken, Hold)
            return taken

    slow = take()
    with sessions.begin() as session:
        make_late(session, "idempotency_keys", "locked_until")
    second = take()
    with sessions() as session, pytest.raises(IdempotencyConflict):
        idempotency.settle(session, slow, job_id=create_id())
    with sessions.begin() as session:
        idempotency.release(session, slow)
    assert read_only(sessions, IdempotencyKey).locked_until == second.locked_until


def test_a_request_whose_commit_was_not_answered_is_one_job_when_it_comes_again(
    api: TestClient, submit: Submit, sessions: SessionFactory
) -> None:
    """The client is told to try again, though the job is there."""
    lost: list[bool] = []

    def commit_and_cut(connection: Connection) -> bool:
        if lost or not connection.scalar(select(func.count()).select_from(Job)):
            return False
        lost.append(True)
        commit(connection)
        return True

    with watched_commits(cast("FastAPI", api.app).state.resources.sessions, commit_and_cut):
        problem(submit(headers=KEY), 503, "database_unavailable")
    assert submit(headers=KEY).json()["id"] == str(read_only(sessions, Job).id)


def test_a_refused_request_has_not_used_its_key(api: TestClient, sessions: SessionFactory) -> None:
    missing = {"mode": "demo", "source": {"upload_id": str(create_id())}}
    problem(api.post("/v1/jobs", json=missing, headers=KEY), 404, "not_found")
    problem(api.post("/v1/jobs", json={**missing, "mode": "best"}, headers=KEY), 422, "invalid_request")
    assert count_rows(sessions, IdempotencyKey) == 0


def test_an_expired_key_is_as_good_as_new(submit: Submit, sessions: SessionFactory) -> None:
    first = submit(headers=KEY)
    with sessions.begin() as session:
        make_late(session, "idempotency_keys", "expires_at")
    second = submit(headers=KEY, priority=1)
    assert (second.status_code, second.json()["id"] != first.json()["id"]) == (202, True)


def test_a_key_that_is_none_is_refused(submit: Submit, sessions: SessionFactory, subtests: pytest.Subtests) -> None:
    for key in (b"", b" ", b'""', b"two words", b"x" * 256, b'"' + b"x" * 256 + b'"', "schlüssel".encode(), b"a\x7fb"):
        with subtests.test(key=key[:20]):
            problem(submit(headers={b"Idempotency-Key": key}), 422, "invalid_request")
    assert count_rows(sessions, Job) == 0


def test_a_key_may_be_of_any_visible_characters(submit: Submit) -> None:
    visible = "".join(chr(code) for code in range(0x21, 0x7F))
    assert submit(headers={"Idempotency-Key": visible}).status_code == 202
    assert submit(headers={"Idempotency-Key": "x" * 255}).status_code == 202
