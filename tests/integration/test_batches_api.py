"""Batches over REST: many jobs accepted as one, or none of them; watched, canceled and retried as one."""

import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from fastapi import FastAPI
from sqlalchemy import Connection, func, select, text
from starlette.testclient import TestClient

from api import acceptance
from api.schemas import BATCH_ITEMS, BATCH_PRIORITY
from shared import lateness, lifecycle
from shared.db import SessionFactory
from shared.lifecycle import ClaimedStep
from shared.models import Batch, IdempotencyKey, Job, JobEvent, JobState, Step, WebhookDelivery, create_id
from tests.integration.conftest import (
    BAD_MEDIA,
    MODEL,
    TIMING,
    Broker,
    Submit,
    commit,
    count_rows,
    problem,
    read_only,
    wait_until,
    watched_commits,
)

KEY = {"Idempotency-Key": "a-key"}
BATCH_FIELDS = {
    "id", "name", "state", "mode", "options", "metadata", "priority", "jobs", "progress", "created_at", "finished_at",
    "links",
}  # fmt: skip
JOBS_FIELDS = {"total", *JobState}
PROGRESS_FIELDS = {"done", "total", "unit", "frames_per_second", "eta_seconds"}

Json = dict[str, Any]
Claim = Callable[..., ClaimedStep | None]
Take = Callable[[], ClaimedStep]
PutUpload = Callable[..., str]


@pytest.fixture
def take(claim: Claim) -> Take:
    def take_one() -> ClaimedStep:
        claimed = claim()
        assert claimed is not None
        return claimed

    return take_one


@pytest.fixture
def succeed(sessions: SessionFactory, take: Take) -> Callable[[], None]:
    """What a worker does with the next image."""

    def end() -> None:
        lease = take().lease
        with sessions.begin() as session:
            lifecycle.publish(session, lease, manifest_key="a key", model=MODEL, timing=TIMING)

    return end


@pytest.fixture
def fail(sessions: SessionFactory, take: Take) -> Callable[[], None]:
    def end() -> None:
        lease = take().lease
        with sessions.begin() as session:
            lifecycle.fail_step(session, lease, BAD_MEDIA, failed_attempts=3)

    return end


End = Callable[[], None]


def look(api: TestClient, batch: Json) -> Json:
    answer = api.get(batch["links"]["self"])
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def states(batch: Json) -> dict[str, int]:
    return {name: number for name, number in batch["jobs"].items() if number and name != "total"}


def told(sessions: SessionFactory) -> list[Json]:
    """What the webhooks of batches say, the oldest first."""
    with sessions() as session:
        wanted = select(WebhookDelivery.body).where(WebhookDelivery.type == "batch.completed")
        return [json.loads(body) for body in session.scalars(wanted.order_by(WebhookDelivery.id))]


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
        "body.prefix": {"items": [item], "prefix": "s3://bucket/folder"},
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


# --- looking -------------------------------------------------------------------------------------------------------


def test_a_batch_counts_its_jobs_in_every_state_and_their_frames(
    api: TestClient, submit_batch: Submit, succeed: End, fail: End, take: Take
) -> None:
    batch = submit_batch(4).json()
    assert batch["progress"] == {
        "done": 0, "total": 4, "unit": "frames", "frames_per_second": None, "eta_seconds": None
    }  # fmt: skip
    succeed()
    fail()
    take()
    seen = look(api, batch)
    assert states(seen) == {"succeeded": 1, "failed": 1, "running": 1, "queued": 1}
    assert (seen["progress"]["done"], seen["progress"]["total"]) == (1, 4)


def test_the_time_left_is_the_frames_left_by_the_speed_so_far(
    api: TestClient, submit_batch: Submit, succeed: End, sessions: SessionFactory
) -> None:
    batch = submit_batch(4).json()
    succeed()
    with sessions.begin() as session:
        earlier = "SET started_at = now() - interval '10 s' WHERE state = 'succeeded'"
        session.execute(text("UPDATE batches SET opened_at = now() - interval '20 s'"))
        session.execute(text(f"UPDATE jobs {earlier}"))
    progress = look(api, batch)["progress"]
    assert progress["frames_per_second"] == pytest.approx(0.1, rel=0.2)
    assert progress["eta_seconds"] == pytest.approx(3 / progress["frames_per_second"], rel=0.01)


def test_a_recording_that_was_not_probed_leaves_the_frames_of_its_batch_open(
    api: TestClient, submit_batch: Submit, sessions: SessionFactory
) -> None:
    batch = submit_batch(2).json()
    with sessions.begin() as session:
        one = "id = (SELECT id FROM jobs LIMIT 1)"
        session.execute(text(f"UPDATE jobs SET kind = 'recording' WHERE {one}"))  # noqa: S608
    progress = look(api, batch)["progress"]
    assert (progress["done"], progress["total"], progress["eta_seconds"]) == (0, None, None)


def test_batches_are_listed_newest_first_in_pages_that_miss_nothing(
    api: TestClient, submit_batch: Submit, succeed: End
) -> None:
    made = [submit_batch(1).json()["id"] for _ in range(3)]
    succeed()
    first = api.get("/v1/batches", params={"limit": 2}).json()
    second = api.get("/v1/batches", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [batch["id"] for batch in first["items"] + second["items"]] == made[::-1]
    assert second["next_cursor"] is None
    assert [batch["state"] for batch in first["items"] + second["items"]] == ["running", "running", "completed"]
    assert first["items"][0] == look(api, first["items"][0])


def test_a_cursor_that_was_not_given_out_is_refused(api: TestClient) -> None:
    problem(api.get("/v1/batches", params={"cursor": "bm9uZQ=="}), 422, "invalid_request")


def test_a_foreign_batch_is_not_there(api: TestClient, submit_batch: Submit, foreign: dict[str, str]) -> None:
    links = submit_batch(1).json()["links"]
    problem(api.get(links["self"], headers=foreign), 404, "not_found")
    problem(api.post(links["cancel"], headers=foreign), 404, "not_found")
    problem(api.post(links["retry_failed"], headers=foreign), 404, "not_found")
    assert api.get("/v1/batches", headers=foreign).json()["items"] == []
    assert states(look(api, {"links": links})) == {"queued": 1}
    problem(api.get(f"/v1/batches/{uuid.uuid4()}"), 404, "not_found")


# --- its end -------------------------------------------------------------------------------------------------------


def test_a_batch_is_completed_when_its_last_job_ends_whichever_way(
    api: TestClient, submit_batch: Submit, succeed: End, fail: End, sessions: SessionFactory
) -> None:
    batch = submit_batch(3, webhook_url="https://receiver.example").json()
    succeed()
    fail()
    assert (look(api, batch)["state"], told(sessions)) == ("running", [])
    [queued] = api.get(batch["links"]["jobs"], params={"batch_id": batch["id"], "state": "queued"}).json()["items"]
    api.post(queued["links"]["cancel"])
    seen = look(api, batch)
    assert (seen["state"], states(seen)) == ("completed", {"succeeded": 1, "failed": 1, "canceled": 1})
    assert seen["finished_at"] is not None
    assert seen["progress"]["eta_seconds"] is None
    assert len(told(sessions)) == 1


def test_the_webhook_tells_the_same_batch_as_the_api(
    api: TestClient, submit_batch: Submit, succeed: End, sessions: SessionFactory
) -> None:
    batch = submit_batch(2, webhook_url="https://receiver.example/hook?token=secret", metadata={"a": "ü"}).json()
    succeed()
    succeed()
    [event] = told(sessions)
    assert (event["type"], set(event)) == ("batch.completed", {"type", "timestamp", "data"})
    assert event["data"] == look(api, batch)
    delivery = read_only(sessions, WebhookDelivery)
    assert (delivery.job_id, delivery.url) == (None, "https://receiver.example/hook?token=secret")
    assert "secret" not in delivery.body


def test_the_webhook_stays_under_20_kb_whatever_the_customer_keeps_in_it(
    submit_batch: Submit, succeed: End, sessions: SessionFactory
) -> None:
    answer = submit_batch(1, webhook_url="https://receiver.example", name="名" * 200, metadata={"a": "x" * 15_900})
    assert answer.status_code == 202
    succeed()
    assert len(read_only(sessions, WebhookDelivery).body.encode()) < 20_000


def test_a_deleted_job_does_not_change_what_its_batch_came_to(
    api: TestClient, submit_batch: Submit, succeed: End
) -> None:
    batch = submit_batch(2).json()
    succeed()
    [job] = api.get("/v1/jobs", params={"batch_id": batch["id"], "state": "succeeded"}).json()["items"]
    assert api.delete(job["links"]["self"]).status_code == 204
    assert (look(api, batch)["state"], states(look(api, batch))) == ("running", {"queued": 1})
    succeed()
    ended = look(api, batch)
    assert (ended["state"], states(ended)) == ("completed", {"succeeded": 1})
    [job] = api.get("/v1/jobs", params={"batch_id": batch["id"]}).json()["items"]
    assert api.delete(job["links"]["self"]).status_code == 204
    assert look(api, batch) == ended


# --- cancel --------------------------------------------------------------------------------------------------------


def test_canceling_a_batch_ends_what_is_queued_and_asks_what_runs_to_stop(
    api: TestClient, submit_batch: Submit, succeed: End, take: Take, sessions: SessionFactory
) -> None:
    batch = submit_batch(4, webhook_url="https://receiver.example").json()
    succeed()
    running = take()
    answer = api.post(batch["links"]["cancel"])
    assert answer.status_code == 202
    assert (answer.json()["state"], states(answer.json())) == ("running", {"succeeded": 1, "running": 1, "canceled": 2})
    with sessions.begin() as session:
        assert lifecycle.heartbeat(session, running.lease, lease_seconds=30) == "stop"
        lifecycle.stop_step(session, running.lease)
    seen = look(api, batch)
    assert (seen["state"], states(seen)) == ("completed", {"succeeded": 1, "canceled": 3})
    assert len(told(sessions)) == 1


def test_canceling_a_batch_twice_is_the_same_as_once(
    api: TestClient, submit_batch: Submit, sessions: SessionFactory
) -> None:
    batch = submit_batch(3, webhook_url="https://receiver.example").json()
    first, second = (api.post(batch["links"]["cancel"]) for _ in range(2))
    assert (first.status_code, first.json()) == (second.status_code, second.json())
    assert states(first.json()) == {"canceled": 3}
    assert len(told(sessions)) == 1


def test_a_batch_larger_than_one_slice_is_canceled_to_its_end(
    api: TestClient, submit_batch: Submit, monkeypatch: pytest.MonkeyPatch, sessions: SessionFactory
) -> None:
    monkeypatch.setattr("shared.batches.CANCELED_AT_ONCE", 2)
    batch = submit_batch(5, webhook_url="https://receiver.example").json()
    assert states(api.post(batch["links"]["cancel"]).json()) == {"canceled": 5}
    assert len(told(sessions)) == 1


def test_a_cancel_touches_no_other_batch(api: TestClient, submit_batch: Submit, submit: Submit) -> None:
    first, second, job = submit_batch(2).json(), submit_batch(2).json(), submit().json()
    api.post(first["links"]["cancel"])
    assert states(look(api, second)) == {"queued": 2}
    assert api.get(job["links"]["self"]).json()["state"] == "queued"


# --- retry-failed --------------------------------------------------------------------------------------------------


def test_what_failed_is_retried_and_the_batch_is_completed_a_second_time(
    api: TestClient, submit_batch: Submit, succeed: End, fail: End, sessions: SessionFactory, broker: Broker
) -> None:
    batch = submit_batch(3, webhook_url="https://receiver.example").json()
    succeed()
    fail()
    api.post(batch["links"]["cancel"])
    answer = api.post(batch["links"]["retry_failed"])
    again = answer.json()
    assert (answer.status_code, again["state"], again["finished_at"]) == (202, "running", None)
    assert states(again) == {"succeeded": 1, "queued": 2}
    wait_until(lambda: len(broker.steps()) == 5)
    succeed()
    assert look(api, batch)["state"] == "running"
    succeed()
    assert (look(api, batch)["state"], states(look(api, batch))) == ("completed", {"succeeded": 3})
    assert [event["data"]["jobs"]["succeeded"] for event in told(sessions)] == [1, 3]
    with sessions() as session:
        assert len(set(session.scalars(select(WebhookDelivery.id)))) == 2


def test_expired_jobs_are_retried_too(api: TestClient, submit_batch: Submit, sessions: SessionFactory) -> None:
    batch = submit_batch(1).json()
    with sessions.begin() as session:
        session.execute(text("UPDATE jobs SET start_by = now() - interval '1 s'"))
        assert lateness.expire(session) is not None
    assert states(look(api, batch)) == {"expired": 1}
    assert states(api.post(batch["links"]["retry_failed"]).json()) == {"queued": 1}


def test_retrying_when_nothing_failed_changes_nothing(
    api: TestClient, submit_batch: Submit, succeed: End, sessions: SessionFactory
) -> None:
    batch = submit_batch(1, webhook_url="https://receiver.example").json()
    succeed()
    ended = look(api, batch)
    assert api.post(batch["links"]["retry_failed"]).json() == ended
    assert len(told(sessions)) == 1


def test_a_retry_of_one_job_reopens_its_batch(api: TestClient, submit_batch: Submit, succeed: End, fail: End) -> None:
    batch = submit_batch(1).json()
    fail()
    assert look(api, batch)["state"] == "completed"
    [job] = api.get(batch["links"]["jobs"]).json()["items"]
    api.post(job["links"]["retry"])
    assert look(api, batch)["state"] == "running"
    succeed()
    assert (look(api, batch)["state"], states(look(api, batch))) == ("completed", {"succeeded": 1})


def test_a_deleted_job_is_not_retried(api: TestClient, submit_batch: Submit, fail: End) -> None:
    batch = submit_batch(1).json()
    fail()
    [job] = api.get(batch["links"]["jobs"]).json()["items"]
    api.delete(job["links"]["self"])
    assert api.post(batch["links"]["retry_failed"]).json()["state"] == "completed"
