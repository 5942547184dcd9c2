"""Webhooks on their way: signed by the standard, sent on schedule until they arrive, and by one sender at a time."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text
from standardwebhooks import Webhook, WebhookVerificationError

from shared import deliveries
from shared.db import SessionFactory
from shared.deliveries import Outcome
from shared.models import DeliveryState, Job, Tenant, WebhookDelivery
from tests.integration.conftest import count_rows, make_late, read_only
from tests.integration.deliveries import send_in_vain, take_delivery
from tests.receiver import Receiver, run_receiver
from worker.deliver import Sender


def delivery(sessions: SessionFactory) -> WebhookDelivery:
    return read_only(sessions, WebhookDelivery)


def seconds_until_next(sessions: SessionFactory) -> float:
    with sessions() as session:
        seconds = session.scalar(text("SELECT extract(epoch FROM next_attempt_at - now()) FROM webhook_deliveries"))
    return float(seconds)


# --- what arrives --------------------------------------------------------------------------------------------------


def test_news_arrive_signed_as_the_reference_library_wants_it(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], tenant: Tenant, sessions: SessionFactory
) -> None:
    job = end_job(receiver.url, details={"name": "Zoë ✓"})
    sender.send_due()
    [received] = receiver.deliveries
    event: dict[str, Any] = received.verify(tenant.webhook_secret)
    assert (event["type"], event["data"]["id"]) == ("job.canceled", str(job.id))
    assert event["data"]["metadata"] == {"name": "Zoë ✓"}
    assert received.headers["content-type"] == "application/json"
    assert delivery(sessions).state == DeliveryState.DELIVERED


def test_a_body_that_was_changed_on_its_way_does_not_verify(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], tenant: Tenant
) -> None:
    end_job(receiver.url)
    sender.send_due()
    [received] = receiver.deliveries
    with pytest.raises(WebhookVerificationError):
        Webhook(tenant.webhook_secret).verify(received.body.replace("canceled", "succeeded"), received.headers)


def test_what_is_sent_is_what_was_recorded(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    end_job(receiver.url)
    recorded = delivery(sessions).body
    sender.send_due()
    assert receiver.deliveries[0].body == recorded


def test_a_second_attempt_has_the_same_id_and_its_own_time(
    sender: Sender, end_job: Callable[..., Job], sessions: SessionFactory, tenant: Tenant
) -> None:
    with run_receiver(status=500) as receiver:
        end_job(receiver.url)
        sender.send_due()
        with sessions.begin() as session:
            make_late(session, "webhook_deliveries", "next_attempt_at")
        time.sleep(1.1)  # the header counts whole seconds
        sender.send_due()
    first, second = receiver.deliveries
    assert first.webhook_id == second.webhook_id
    assert first.body == second.body
    assert int(first.headers["webhook-timestamp"]) < int(second.headers["webhook-timestamp"])
    assert second.verify(tenant.webhook_secret)


def test_everything_that_is_due_is_sent(sender: Sender, receiver: Receiver, end_job: Callable[..., Job]) -> None:
    jobs = [end_job(receiver.url) for _ in range(3)]
    sender.send_due()
    told = sorted(json.loads(each.body)["data"]["id"] for each in receiver.deliveries)  # many are sent at once
    assert told == sorted(str(job.id) for job in jobs)


def test_the_receiver_is_told_the_host_it_was_called_by(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job]
) -> None:
    end_job(receiver.url.replace("127.0.0.1", "localhost"))
    sender.send_due()
    [received] = receiver.deliveries
    assert received.headers["host"].startswith("localhost:")


def test_a_proxy_of_the_machine_is_not_used(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{closed_port}")
    end_job(receiver.url)
    sender.send_due()
    assert len(receiver.deliveries) == 1


def test_a_body_stays_under_20_kb_whatever_the_customer_keeps_in_it(
    end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    job = end_job("https://receiver.example", details={"a": "x" * 25_000})
    body = delivery(sessions).body
    event = json.loads(body)
    assert len(body.encode()) <= 20_000
    assert (event["data"]["id"], event["data"]["metadata"]) == (str(job.id), {})


# --- the schedule --------------------------------------------------------------------------------------------------


def test_pauses_follow_the_schedule_of_the_standard_until_it_ends(
    end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    hours = 3600
    schedule = (5, 300, 1800, 2 * hours, 5 * hours, 10 * hours, 14 * hours, 20 * hours, 24 * hours)
    end_job("https://receiver.example")
    for pause in schedule:
        send_in_vain(sessions)
        assert delivery(sessions).state == DeliveryState.PENDING
        assert 0.99 * pause - 1 <= seconds_until_next(sessions) <= 1.2 * pause
        with sessions.begin() as session:
            make_late(session, "webhook_deliveries", "next_attempt_at")
    send_in_vain(sessions)
    assert (delivery(sessions).state, delivery(sessions).attempt) == (DeliveryState.FAILED, len(schedule) + 1)


# --- several senders -----------------------------------------------------------------------------------------------


def test_each_of_many_deliveries_is_sent_by_one_of_many_senders(
    sender: Sender, receiver: Receiver, end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    for _ in range(12):
        end_job(receiver.url)
    with ThreadPoolExecutor(4) as pool:
        for sending in [pool.submit(sender.send_due) for _ in range(4)]:
            sending.result()
    assert len(receiver.deliveries) == len({each.webhook_id for each in receiver.deliveries}) == 12
    assert count_rows(sessions, WebhookDelivery) == 12


def test_a_delivery_that_is_being_sent_is_nobody_elses(end_job: Callable[..., Job], sessions: SessionFactory) -> None:
    end_job("https://receiver.example")
    assert take_delivery(sessions) is not None
    assert take_delivery(sessions) is None


def test_a_sender_that_died_is_replaced_and_writes_nothing_should_it_return(
    end_job: Callable[..., Job], sessions: SessionFactory
) -> None:
    end_job("https://receiver.example")
    dead = take_delivery(sessions)
    assert dead is not None
    assert 15 < seconds_until_next(sessions) <= deliveries.SENDING_SECONDS
    with sessions.begin() as session:
        make_late(session, "webhook_deliveries", "next_attempt_at")
    second = take_delivery(sessions)
    assert second is not None
    assert (second.id, second.attempt) == (dead.id, dead.attempt + 1)
    with sessions.begin() as session:
        assert deliveries.record(session, dead, Outcome(status=200)) is None
    assert delivery(sessions).state == DeliveryState.PENDING
    with sessions.begin() as session:
        assert deliveries.record(session, second, Outcome(status=200)) == DeliveryState.DELIVERED
        assert deliveries.record(session, second, Outcome(status=500)) is None
    assert delivery(sessions).state == DeliveryState.DELIVERED
