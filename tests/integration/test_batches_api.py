"""Batches over REST: many jobs accepted as one, or none of them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, func, select, text
from starlette.testclient import TestClient

from api import acceptance
from api.schemas import BATCH_ITEMS, BATCH_PRIORITY
from shared.db import SessionFactory
from shared.models import Batch, IdempotencyKey, Job, JobEvent, JobState, Step, WebhookDelivery, create_id
from tests.integration.commits import commit, watched_commits
from tests.integration.conftest import Broker, Submit, Take, count_rows, problem, read_only, wait_until

KEY = {"Idempotency-Key": "a-key"}
BATCH_FIELDS = {
    "id", "name", "state", "mode", "options", "metadata", "priority", "jobs", "progress", "created_at", "finished_at",
    "links",
}  # fmt: skip
JOBS_FIELDS = {"total", *JobState}
PROGRESS_FIELDS = {"done", "total", "unit", "frames_per_second", "eta_seconds"}

Json = dict[str, Any]
PutUpload = Callable[..., str]


def states(batch: Json) -> dict[str, int]:
    return {name: number for name, number in batch["jobs"].items() if number and name != "total"}


# --- submitting ----------------------------------------------------------------------------------------------------


def test_a_batch_is_accepted_and_makes_one_job_of_every_item(
    api: TestClient, put_upload: PutUpload, submit_batch: Submit, broker: Broker
) -> None:
    items = [{"source": {"upload_id": put_upload()}, "metadata": {"number": number}} for number in range(3)]
    answer = submit_batch(items=items, options={"input_size": 64}, metadata={"of": "all"}, priority=-20)
    batch = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/batches/{batch['id']}")
    assert (set(batch), set(batch["jobs"]), set(batch["progress"])) == (BATCH_FIELDS, JOBS_FIELDS, PROGRESS_FIELDS)
    assert (batch["name"], batch["state"], batch["metadata"]) == ("a batch", "running", {"of": "all"})
    assert (batch["jobs"]["total"], states(batch)) == (3, {"queued": 3})
    jobs = api.get(batch["links"]["jobs"]).json()["items"]
    assert sorted(job["metadata"]["number"] for job in jobs) == [0, 1, 2]
    assert {(job["batch_id"], job["mode"], job["priority"]) for job in jobs} == {(batch["id"], "demo", -20)}
    assert {job["options"]["input_size"] for job in jobs} == {64}
    wait_until(lambda: len(broker.steps()) == 3)


def test_the_items_of_a_batch_are_taken_in_their_order(
    api: TestClient, put_upload: PutUpload, submit_batch: Submit, take: Take
) -> None:
    numbered = [{"source": {"upload_id": put_upload()}, "metadata": {"number": number}} for number in range(3)]
    submit_batch(items=numbered)
    assert [take().job.details["number"] for _ in range(3)] == [0, 1, 2]


def test_whoever_waits_for_a_single_job_does_not_wait_for_a_batch(
    submit: Submit, submit_batch: Submit, take: Take
) -> None:
    batch = submit_batch(2).json()
    job = submit().json()
    assert batch["priority"] == BATCH_PRIORITY
    assert [str(take().job.id) == job["id"] for _ in range(3)] == [True, False, False]


def test_a_batch_may_have_its_own_priority(submit: Submit, submit_batch: Submit, take: Take) -> None:
    submit()
    submit_batch(1, priority=1)
    assert take().job.batch_id is not None


def test_a_large_batch_is_accepted_within_its_limits(
    api: TestClient, submit_batch: Submit, put_upload: PutUpload, sessions: SessionFactory, broker: Broker
) -> None:
    """The body is larger than other JSON may be, and no more workers are woken than could be idle."""
    put_upload()
    copies = """INSERT INTO uploads SELECT (jsonb_populate_record(uploads, jsonb_build_object('id', gen_random_uuid(),
        'etag', NULL))).* FROM uploads, generate_series(1, 199) RETURNING id"""
    with sessions.begin() as session:
        ids = [str(each) for each in session.scalars(text(copies))]
    metadata = {"note": "x" * 6000}
    batch = submit_batch(items=[{"source": {"upload_id": each}, "metadata": metadata} for each in ids]).json()
    assert batch["jobs"]["queued"] == 199
    wait_until(lambda: len(broker.steps()) == acceptance.WOKEN_AT_ONCE)
    assert api.post(batch["links"]["cancel"]).json()["jobs"]["canceled"] == 199


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_left(sessions: SessionFactory) -> Callable[[], None]:
    def check() -> None:
        for table in (Batch, Job, Step, JobEvent, IdempotencyKey, WebhookDelivery):
            assert count_rows(sessions, table) == 0, table

    return check


def test_bodies_that_are_no_batch_are_refused(
    api: TestClient, submit_batch: Submit, nothing_left: Callable[[], None], subtests: pytest.Subtests
) -> None:
    item = {"source": {"upload_id": str(create_id())}}
    wrong: dict[str, Json] = {
        "body.items": {"items": []},
        "body.items.0.source.upload_id": {"items": [{"source": {"upload_id": "none"}}]},
        "body.items.1.source": {"items": [item, {}]},
        "body.items.0.mode": {"items": [{**item, "mode": "fast"}]},
        "body.items.0.metadata": {"items": [{**item, "metadata": {"a": "\x00"}}]},
        "body": {"items": [item], "prefix": "s3://bucket/folder"},
        "body.items.0.source": {"items": [{"source": {"s3": "s3://bucket/key", "url": "https://a.example/b"}}]},
        "body.items.0.source.s3": {"items": [{"source": {"s3": "bucket/key"}}]},
        "body.items.0.source.url": {"items": [{"source": {"url": "ftp://a.example/b"}}]},
        "body.name": {"items": [item], "name": ""},
        "body.mode": {"items": [item], "mode": "best"},
        "body.priority": {"items": [item], "priority": 101},
        "body.options.nothing": {"items": [item], "options": {"nothing": 1}},
        "body.webhook_url": {"items": [item], "webhook_url": "ftp://receiver.example"},
    }
    for field, changed in wrong.items():
        with subtests.test(field=field):
            answer = problem(submit_batch(headers=KEY, **changed), 422, "invalid_request")
            assert [each["field"] for each in answer["errors"]] == [field]
    nothing_left()


def test_more_items_than_a_batch_may_have_are_refused(submit_batch: Submit, nothing_left: Callable[[], None]) -> None:
    items = [{"source": {"upload_id": str(create_id())}} for _ in range(BATCH_ITEMS + 1)]
    answer = problem(submit_batch(items=items), 422, "invalid_request")
    assert [each["field"] for each in answer["errors"]] == ["body.items"]
    nothing_left()


def test_a_batch_with_a_wrong_item_is_refused_as_a_whole_and_says_which(
    api: TestClient,
    put_upload: PutUpload,
    submit_batch: Submit,
    foreign: dict[str, str],
    nothing_left: Callable[[], None],
    subtests: pytest.Subtests,
) -> None:
    good = put_upload()
    announced = {"filename": "a.png", "size": 10}
    wrong = {
        "not_found": api.post("/v1/uploads", json=announced, headers=foreign).json()["id"],
        "upload_incomplete": api.post("/v1/uploads", json=announced).json()["id"],
        "duplicate": good,
    }
    for rule, upload_id in wrong.items():
        with subtests.test(rule=rule):
            items = [{"source": {"upload_id": each}} for each in (good, upload_id)]
            answer = problem(submit_batch(items=items, headers=KEY), 422, "invalid_request")
            assert [(each["field"], each["rule"]) for each in answer["errors"]] == [
                ("body.items.1.source.upload_id", rule)
            ]
    nothing_left()


def test_a_refusal_names_no_more_items_than_anyone_reads(submit_batch: Submit) -> None:
    items = [{"source": {"upload_id": str(create_id())}} for _ in range(300)]
    answer = problem(submit_batch(items=items), 422, "invalid_request")
    assert len(answer["errors"]) == 50
    assert answer["detail"].endswith("and 250 more")


def test_an_image_in_a_batch_that_chooses_frames_is_refused(
    submit_batch: Submit, nothing_left: Callable[[], None]
) -> None:
    answer = problem(submit_batch(2, options={"frames": {"every": 2}}), 422, "invalid_request")
    assert [each["field"] for each in answer["errors"]] == [f"body.items.{n}.source.upload_id" for n in range(2)]
    nothing_left()


# --- Idempotency-Key -----------------------------------------------------------------------------------------------


def test_the_same_batch_again_is_answered_with_the_same_batch(
    put_upload: PutUpload, submit_batch: Submit, sessions: SessionFactory
) -> None:
    items = [{"source": {"upload_id": put_upload()}}]
    first, second = (submit_batch(items=items, headers=KEY) for _ in range(2))
    assert (first.status_code, first.json()) == (second.status_code, second.json())
    assert (count_rows(sessions, Batch), count_rows(sessions, Job)) == (1, 1)


def test_another_batch_or_a_job_with_the_same_key_is_refused(
    api: TestClient, put_upload: PutUpload, submit_batch: Submit
) -> None:
    source = {"upload_id": put_upload()}
    submit_batch(items=[{"source": source}], headers=KEY)
    changed = submit_batch(items=[{"source": source, "metadata": {"a": 1}}], headers=KEY)
    problem(changed, 422, "idempotency_mismatch")
    job = api.post("/v1/jobs", json={"mode": "demo", "source": source}, headers=KEY)
    problem(job, 422, "idempotency_mismatch")


def test_twins_that_come_together_make_one_batch(
    put_upload: PutUpload, submit_batch: Submit, sessions: SessionFactory
) -> None:
    items = [{"source": {"upload_id": put_upload()}}]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: submit_batch(items=items, headers=KEY), range(4)))
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert (count_rows(sessions, Batch), count_rows(sessions, Job)) == (1, 1)


def test_a_batch_whose_commit_was_not_answered_is_one_batch_when_it_comes_again(
    api: TestClient, put_upload: PutUpload, submit_batch: Submit, sessions: SessionFactory
) -> None:
    items = [{"source": {"upload_id": put_upload()}}]
    lost: list[bool] = []

    def commit_and_cut(connection: Connection) -> bool:
        if lost or not connection.scalar(select(func.count()).select_from(Batch)):
            return False
        lost.append(True)
        commit(connection)
        return True

    with watched_commits(cast("FastAPI", api.app).state.resources.sessions, commit_and_cut):
        problem(submit_batch(items=items, headers=KEY), 503, "database_unavailable")
    assert submit_batch(items=items, headers=KEY).json()["id"] == str(read_only(sessions, Batch).id)


def test_a_batch_whose_commit_failed_left_nothing_behind(
    api: TestClient, put_upload: PutUpload, submit_batch: Submit, sessions: SessionFactory
) -> None:
    items = [{"source": {"upload_id": put_upload()}} for _ in range(2)]
    cut: list[bool] = []

    def before_the_batch(connection: Connection) -> bool:
        if cut or not connection.scalar(select(func.count()).select_from(Batch)):
            return False
        cut.append(True)
        return True

    with watched_commits(cast("FastAPI", api.app).state.resources.sessions, before_the_batch):
        problem(submit_batch(items=items, headers=KEY), 503, "database_unavailable")
    assert (count_rows(sessions, Batch), count_rows(sessions, Job), count_rows(sessions, Step)) == (0, 0, 0)
    assert submit_batch(items=items, headers=KEY).json()["jobs"]["total"] == 2
