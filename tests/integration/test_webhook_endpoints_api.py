"""Endpoints over REST: registered, changed, pinged, their secrets seen once, what was sent to them, and sent again."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from sqlalchemy import func, select, text
from starlette.testclient import TestClient

from shared.config import Settings, Webhooks
from shared.db import SessionFactory
from shared.models import Job, Tenant, WebhookAttempt, WebhookDelivery, WebhookEndpoint
from tests.integration.conftest import Broker, MakeJob, count_rows, make_late, problem, read_only, serve, wait_until
from tests.integration.deliveries import send_in_vain, take_delivery
from tests.receiver import Receiver, run_receiver
from worker.deliver import Sender
from worker.housekeeping import Housekeeping

URL = "https://receiver.example/hook"
Register = Callable[..., dict[str, Any]]


@pytest.fixture
def register(api: TestClient) -> Register:
    def send(url: str = URL, **fields: Any) -> dict[str, Any]:
        answer = api.post("/v1/webhooks", json={"url": url, **fields})
        assert answer.status_code == 201, answer.text
        endpoint: dict[str, Any] = answer.json()
        return endpoint

    return send


def path(endpoint: dict[str, Any]) -> str:
    return f"/v1/webhooks/{endpoint['id']}"


# --- registered ----------------------------------------------------------------------------------------------------


def test_an_endpoint_is_as_it_was_registered(api: TestClient) -> None:
    wanted = {"url": URL, "events": ["job.failed", "batch.completed"], "description": "the lab's"}
    answer = api.post("/v1/webhooks", json=wanted)
    endpoint = answer.json()
    assert answer.headers["location"] == path(endpoint)
    assert {name: endpoint[name] for name in wanted} == wanted
    assert (endpoint["disabled"], endpoint["failing_since"], endpoint["old_secret_until"]) == (False, None, None)
    secret = endpoint.pop("secret")
    assert secret.startswith("whsec_")
    assert api.get(path(endpoint)).json() == endpoint
    assert api.get("/v1/webhooks").json() == [endpoint]


def test_a_secret_is_shown_once_and_never_again(api: TestClient, register: Register) -> None:
    endpoint = register()
    secret = endpoint["secret"].removeprefix("whsec_")
    api.post(f"{path(endpoint)}/ping")
    for answer in (
        api.get(path(endpoint)), api.get("/v1/webhooks"), api.patch(path(endpoint), json={"description": "a"}),
        api.get(f"{path(endpoint)}/deliveries"), api.get("/v1/webhooks/deliveries"),
    ):  # fmt: skip
        assert answer.status_code == 200
        assert secret not in answer.text
    assert endpoint["secret"].startswith(endpoint["secret_hint"].removesuffix("…"))
    assert len(endpoint["secret_hint"]) < 12


def test_endpoints_are_listed_the_newest_first(api: TestClient, register: Register) -> None:
    made = [register(f"{URL}/{number}")["id"] for number in range(3)]
    assert [each["id"] for each in api.get("/v1/webhooks").json()] == made[::-1]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": None},
        {"url": "ftp://receiver.example"},
        {"url": "https://user:password@receiver.example"},
        {"url": "https://" + "a" * 2050},
        {"url": URL, "events": []},
        {"url": URL, "events": ["job.finished"]},
        {"url": URL, "events": ["ping"]},
        {"url": URL, "events": "job.failed"},
        {"url": URL, "description": "a" * 201},
        {"url": URL, "description": "\x00"},
        {"url": URL, "secret": "whsec_AAAA"},
        {"url": URL, "disabled": True},
    ],
)
def test_what_makes_no_endpoint_is_refused(api: TestClient, body: dict[str, Any], sessions: SessionFactory) -> None:
    problem(api.post("/v1/webhooks", json=body), 422, "invalid_request")
    assert count_rows(sessions, WebhookEndpoint) == 0


def test_a_tenant_has_a_url_once(api: TestClient, register: Register, foreign: dict[str, str]) -> None:
    endpoint = register()
    assert endpoint["id"] in problem(api.post("/v1/webhooks", json={"url": URL}), 409, "endpoint_exists")["detail"]
    other = register(f"{URL}/other")
    problem(api.patch(path(other), json={"url": URL}), 409, "endpoint_exists")
    assert api.patch(path(other), json={"url": f"{URL}/other"}).status_code == 200
    assert api.post("/v1/webhooks", json={"url": URL}, headers=foreign).status_code == 201


def test_a_tenant_has_so_many_endpoints_even_when_it_asks_for_all_at_once(
    settings: Settings, api_key: str, sessions: SessionFactory
) -> None:
    few = settings.model_copy(update={"webhooks": Webhooks(endpoints_per_tenant=3)})
    with serve(few, key=api_key) as api, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda number: api.post("/v1/webhooks", json={"url": f"{URL}/{number}"}), range(6)))
    assert sorted(each.status_code for each in answers) == [201] * 3 + [409] * 3
    problem(next(each for each in answers if each.status_code == 409), 409, "too_many_endpoints")
    assert count_rows(sessions, WebhookEndpoint) == 3


# --- changed -------------------------------------------------------------------------------------------------------


def test_a_change_leaves_the_rest_as_it_was(api: TestClient, register: Register) -> None:
    endpoint = register(events=["job.failed"], description="a")
    del endpoint["secret"]
    changed = api.patch(path(endpoint), json={"events": None}).json()
    assert changed == {**endpoint, "events": None}
    changed = api.patch(path(endpoint), json={"url": f"{URL}/new", "description": None}).json()
    assert changed == {**endpoint, "events": None, "url": f"{URL}/new", "description": None}


@pytest.mark.parametrize("body", [{"url": None}, {"disabled": None}, {"disabled": 1}, {"secret": "whsec_AAAA"}])
def test_a_change_that_cannot_be_is_refused(api: TestClient, register: Register, body: dict[str, Any]) -> None:
    problem(api.patch(path(register()), json=body), 422, "invalid_request")


def test_a_disabled_endpoint_hears_nothing_until_it_is_enabled(
    api: TestClient, register: Register, end_job: MakeJob, sessions: SessionFactory
) -> None:
    endpoint = register()
    disabled = api.patch(path(endpoint), json={"disabled": True}).json()
    assert (disabled["disabled"], disabled["disabled_reason"]) == (True, "asked")
    assert disabled["disabled_at"]
    end_job()
    problem(api.post(f"{path(endpoint)}/ping"), 409, "endpoint_disabled")
    assert count_rows(sessions, WebhookDelivery) == 0
    enabled = api.patch(path(endpoint), json={"disabled": False}).json()
    assert (enabled["disabled"], enabled["disabled_at"], enabled["disabled_reason"]) == (False, None, None)
    end_job()
    assert read_only(sessions, WebhookDelivery).type == "job.canceled"


def test_an_endpoint_goes_with_all_that_waits_for_it(
    api: TestClient, register: Register, end_job: MakeJob, sessions: SessionFactory, housekeeping: Housekeeping
) -> None:
    endpoint = register()
    end_job("https://receiver.example/its-own")
    send_in_vain(sessions)
    assert api.delete(path(endpoint)).status_code == 204
    problem(api.get(path(endpoint)), 404, "not_found")
    problem(api.delete(path(endpoint)), 404, "not_found")
    housekeeping.forget_endpoints()
    assert read_only(sessions, WebhookDelivery).endpoint_id is None


# --- its secret ----------------------------------------------------------------------------------------------------


def test_after_a_rotation_either_secret_verifies_and_after_a_while_the_new_one_alone(
    api: TestClient, register: Register, sender: Sender, receiver: Receiver, sessions: SessionFactory
) -> None:
    endpoint = register(receiver.url)
    rotated = api.post(f"{path(endpoint)}/rotate-secret").json()
    assert rotated["secret"] not in (None, endpoint["secret"])
    assert rotated["old_secret_until"] is not None
    api.post(f"{path(endpoint)}/ping")
    sender.send_due()
    [received] = receiver.deliveries
    assert [received.verify(each["secret"])["type"] for each in (endpoint, rotated)] == ["ping", "ping"]

    past = """UPDATE webhook_endpoints SET old_secrets =
        jsonb_set(old_secrets, '{0,until}', to_jsonb((now() - interval '1s')::text))"""
    with sessions.begin() as session:
        session.execute(text(past))
    assert api.get(path(endpoint)).json()["old_secret_until"] is None
    api.post(f"{path(endpoint)}/ping")
    sender.send_due()
    assert len(receiver.deliveries[-1].headers["webhook-signature"].split()) == 1
    assert receiver.deliveries[-1].verify(rotated["secret"])


def test_a_rotation_whose_answer_was_lost_may_be_repeated(
    api: TestClient, register: Register, sender: Sender, receiver: Receiver
) -> None:
    endpoint = register(receiver.url)
    rotated = [api.post(f"{path(endpoint)}/rotate-secret").json()["secret"] for _ in range(5)]
    api.post(f"{path(endpoint)}/ping")
    sender.send_due()
    [received] = receiver.deliveries
    assert received.verify(endpoint["secret"])
    assert received.verify(rotated[-1])
    assert len(received.headers["webhook-signature"].split()) == 4


def test_no_secret_is_kept_with_a_delivery_nor_told_by_its_log(
    api: TestClient, register: Register, sender: Sender, end_job: MakeJob, sessions: SessionFactory, tenant: Tenant,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with run_receiver(status=500, reply=f"we know {tenant.webhook_secret}".encode()) as receiver:
        end_job(receiver.url)
        sender.send_due()
    secret = register()["secret"]
    end_job()
    due = take_delivery(sessions)
    assert due is not None
    told = api.get("/v1/webhooks/deliveries").text + caplog.text + repr(due)
    with sessions() as session:
        told += repr(session.execute(select(WebhookDelivery.__table__)).all())
        told += repr(session.execute(select(WebhookAttempt.__table__)).all())
    assert "we know" in told
    for each in (secret, tenant.webhook_secret):
        assert each.removeprefix("whsec_") not in told


# --- what was sent -------------------------------------------------------------------------------------------------


def test_a_ping_arrives_whatever_events_were_chosen_and_its_log_says_so(
    api: TestClient, register: Register, sender: Sender
) -> None:
    with run_receiver(status=202, reply="schön".encode() + b"\x00\xff") as receiver:
        endpoint = register(receiver.url, events=["job.failed"])
        sent = api.post(f"{path(endpoint)}/ping")
        assert sent.status_code == 202
        sender.send_due()
    [received] = receiver.deliveries
    assert received.verify(endpoint["secret"])["data"] == {"id": endpoint["id"]}
    [delivery] = api.get(f"{path(endpoint)}/deliveries").json()["items"]
    assert (delivery["id"], delivery["webhook_id"]) == (sent.json()["id"], received.webhook_id)
    assert (delivery["type"], delivery["state"], delivery["next_attempt_at"]) == ("ping", "delivered", None)
    [attempt] = delivery["attempts"]
    assert (attempt["number"], attempt["status"], attempt["error"]) == (1, 202, None)
    assert attempt["reply"] == "schön�"
    assert 0 < attempt["latency_seconds"] < 1


def test_the_log_says_why_there_was_no_answer_and_when_the_next_attempt_is(
    api: TestClient, register: Register, sender: Sender, closed_port: int
) -> None:
    endpoint = register(f"http://127.0.0.1:{closed_port}/")
    api.post(f"{path(endpoint)}/ping")
    sender.send_due()
    [delivery] = api.get(f"{path(endpoint)}/deliveries").json()["items"]
    assert delivery["state"] == "pending"
    assert delivery["next_attempt_at"] > delivery["attempts"][0]["ended_at"]
    assert delivery["attempts"][0]["status"] is None
    assert "refused" in delivery["attempts"][0]["error"]


def test_the_log_keeps_the_beginning_of_a_reply_and_the_newest_attempts(
    api: TestClient, register: Register, sender: Sender, sessions: SessionFactory
) -> None:
    with run_receiver(status=500, reply=b"x" * 5000) as receiver:
        endpoint = register(receiver.url)
        delivery = api.post(f"{path(endpoint)}/ping").json()
        sender.send_due()
    [shown] = api.get(f"{path(endpoint)}/deliveries").json()["items"]
    assert shown["attempts"][0]["reply"] == "x" * 1000
    for _ in range(24):
        api.post(f"/v1/webhooks/deliveries/{delivery['id']}/redeliver")
        send_in_vain(sessions)
    [shown] = api.get(f"{path(endpoint)}/deliveries").json()["items"]
    assert [each["number"] for each in shown["attempts"]] == list(range(6, 26))


def test_deliveries_come_in_pages_the_newest_first(api: TestClient, register: Register) -> None:
    endpoint = register()
    sent = [api.post(f"{path(endpoint)}/ping").json()["id"] for _ in range(5)]
    found, cursor = [], None
    while True:
        chosen = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = api.get(f"{path(endpoint)}/deliveries", params=chosen).json()
        found += [each["id"] for each in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == sent[::-1]
    problem(api.get(f"{path(endpoint)}/deliveries", params={"cursor": "garbage"}), 422, "invalid_request")


def test_the_deliveries_of_a_job_are_those_to_its_own_url_and_to_endpoints(
    api: TestClient, register: Register, end_job: MakeJob, foreign: dict[str, str]
) -> None:
    endpoint = register()
    job = end_job("https://receiver.example/its-own?token=x")
    end_job()
    listed = api.get("/v1/webhooks/deliveries", params={"job_id": str(job.id)})
    assert [each["endpoint_id"] for each in listed.json()["items"]] == [endpoint["id"], None]
    assert "token" not in listed.text
    assert api.get("/v1/webhooks/deliveries", headers=foreign).json()["items"] == []


# --- sent again ----------------------------------------------------------------------------------------------------


def redeliver(api: TestClient, delivery: WebhookDelivery) -> httpx2.Response:
    return api.post(f"/v1/webhooks/deliveries/{delivery.id}/redeliver")


def test_what_was_delivered_can_be_sent_again_under_its_old_id(
    api: TestClient, sender: Sender, receiver: Receiver, end_job: MakeJob, sessions: SessionFactory
) -> None:
    end_job(receiver.url)
    sender.send_due()
    sender.send_due()
    answer = redeliver(api, read_only(sessions, WebhookDelivery))
    assert (answer.status_code, answer.json()["state"], answer.json()["finished_at"]) == (202, "pending", None)
    sender.send_due()
    first, second = receiver.deliveries
    assert (first.webhook_id, first.body) == (second.webhook_id, second.body)
    assert read_only(sessions, WebhookDelivery).state == "delivered"


def test_what_was_given_up_is_tried_again_from_the_beginning_of_the_schedule(
    api: TestClient, end_job: MakeJob, sessions: SessionFactory
) -> None:
    end_job("https://receiver.example")
    for _ in range(10):
        send_in_vain(sessions)
        with sessions.begin() as session:
            make_late(session, "webhook_deliveries", "next_attempt_at")
    assert read_only(sessions, WebhookDelivery).state == "failed"
    redeliver(api, read_only(sessions, WebhookDelivery))
    send_in_vain(sessions)
    row = read_only(sessions, WebhookDelivery)
    assert (row.state, row.attempt) == ("pending", 11)
    with sessions() as session:
        pause = session.scalar(select(func.extract("epoch", WebhookDelivery.next_attempt_at - func.now())))
    assert 0 < float(pause or 0) <= 6


def test_what_waits_for_its_next_attempt_can_be_sent_now(
    api: TestClient, sender: Sender, end_job: MakeJob, sessions: SessionFactory, receiver: Receiver
) -> None:
    end_job(receiver.url)
    send_in_vain(sessions)
    redeliver(api, read_only(sessions, WebhookDelivery))
    sender.send_due()
    assert len(receiver.deliveries) == 1


def test_nothing_is_sent_again_to_an_endpoint_that_is_disabled(
    api: TestClient, register: Register, end_job: MakeJob, sessions: SessionFactory
) -> None:
    endpoint = register()
    end_job()
    api.patch(path(endpoint), json={"disabled": True})
    problem(redeliver(api, read_only(sessions, WebhookDelivery)), 409, "endpoint_disabled")


def test_a_request_to_send_wakes_the_sender(
    api: TestClient, register: Register, broker: Broker, sessions: SessionFactory
) -> None:
    endpoint = register()
    api.post(f"{path(endpoint)}/ping")
    redeliver(api, read_only(sessions, WebhookDelivery))
    wait_until(lambda: broker.senders() == 2)


def test_news_of_a_job_that_goes_stay_in_the_log(
    api: TestClient, register: Register, end_job: MakeJob, sessions: SessionFactory
) -> None:
    endpoint = register()
    job: Job = end_job()
    assert api.delete(f"/v1/jobs/{job.id}").status_code == 204
    with sessions.begin() as session:
        session.execute(text("DELETE FROM jobs"))
    [kept] = api.get(f"{path(endpoint)}/deliveries").json()["items"]
    assert (kept["type"], kept["job_id"]) == ("job.canceled", None)
