"""The life of a batch over REST: watched, completed, canceled and retried as one."""

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select, text
from starlette.testclient import TestClient

from shared import lateness, lifecycle
from shared.db import SessionFactory
from shared.models import WebhookDelivery
from tests.integration.conftest import (
    BAD_MEDIA,
    MODEL,
    TIMING,
    Broker,
    Submit,
    Take,
    problem,
    read_only,
    wait_until,
)

Json = dict[str, Any]


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
        session.execute(text("UPDATE jobs SET kind = 'recording' WHERE id = (SELECT id FROM jobs LIMIT 1)"))
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
    monkeypatch.setattr("shared.batches.JOBS_AT_ONCE", 2)
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
